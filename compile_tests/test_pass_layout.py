"""layout: the same exchanges as eager, seen in the graph that Inductor lowers and in the number of its kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fvops
from compile_tests.pass_programs import PROGRAMS, Issued, compare_with_eager
from tests.harness import Ranks

FUSED = {"layout": "fused"}
NAMES = ["q, k and v", "both directions", "with a list", "one unread", "read before the second"]


def _compare(
    names: list[str], switches: dict[str, Any], train: bool, batch: int = 1, dynamic: bool | None = None
) -> dict[str, tuple[Issued, Issued]]:
    return compare_with_eager(names, switches, train, batch, dynamic=dynamic)


@pytest.mark.parametrize(("train", "batch"), [(False, 2), pytest.param(True, 1, marks=pytest.mark.slow)])
def test_fused_layout_keeps_the_sequence_of_eager(two_ranks: Ranks, train: bool, batch: int) -> None:
    for results in two_ranks.run(_compare, NAMES, FUSED, train, batch, deadline_s=300):
        for name, (eager, compiled) in results.items():
            assert compiled == eager, name


@pytest.mark.slow
def test_fused_layout_of_merged_exchanges_at_dynamic_lengths(two_ranks: Ranks) -> None:
    switches = {**FUSED, "merge": True}
    results = two_ranks.run(_compare, NAMES[:1], switches, False, 2, True, deadline_s=300)
    assert [len(shapes) for _, shapes, _ in results[0][NAMES[0]][1]] == [3, 1]
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("world_size", [3, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_every_program_with_fused_layout(world_size: int, train: bool, batch: int) -> None:
    for dynamic in (False, True):
        for switches in (FUSED, {**FUSED, "merge": True, "cancel": True}):
            results = Ranks.get(world_size).run(
                _compare, list(PROGRAMS), switches, train, batch, dynamic, deadline_s=900
            )
            assert all(result == results[0] for result in results)
            if switches is FUSED:
                for name, (eager, compiled) in results[0].items():
                    assert compiled == eager, name


def _there(x: Tensor) -> Tensor:
    """An elementwise producer and a consumer that both fuse, around an exchange."""
    return fvops.get_sp_group().all_to_all_4D(x.sin() * 2, 2, 1).cos() + 1


def _there_and_back(x: Tensor) -> Tensor:
    group = fvops.get_sp_group()
    return group.all_to_all_4D(group.all_to_all_4D(x.sin(), 2, 1).cos(), 1, 2).exp()


def _kernels(layout: str) -> list[int]:
    """How many kernels Inductor writes for each of the programs."""
    from torch._inductor import metrics

    counts = []
    for program in (_there, _there_and_back):
        metrics.reset()
        compiled = torch.compile(program, fullgraph=True, options=fvops.compiler.options(layout=layout))
        x = torch.rand(2, 4, 4, 2)
        torch.testing.assert_close(compiled(x), program(x))
        counts.append(metrics.generated_kernel_count)
    return counts


@pytest.mark.parametrize("layout", ["fused", pytest.param("exchange", marks=pytest.mark.slow)])
def test_pack_and_unpack_are_in_the_kernels_next_to_them(two_ranks: Ranks, layout: str) -> None:
    """At B=2, where both ends of an exchange have a layout: one kernel before, between and after, no other."""
    assert two_ranks.run(_kernels, layout, deadline_s=200) == [[2, 3], [2, 3]]


def _lowered(layout: str) -> str:
    """The op that the lowered graph exchanges with."""
    from torch._inductor import config

    seen = []

    def keep(graph: torch.fx.Graph) -> None:
        seen.extend(node.args[1]._opname for node in graph.nodes if "with_effects" in str(node.target))

    with config.patch(post_grad_custom_post_pass=keep):
        torch.compile(_there, fullgraph=True, options=fvops.compiler.options(layout=layout))(torch.rand(1, 4, 4, 2))
    return seen[0]


@pytest.mark.slow
def test_which_layout_is_chosen(two_ranks: Ranks) -> None:
    ops = [two_ranks.run(_lowered, layout, deadline_s=200)[0] for layout in ("fused", "exchange", "auto")]
    assert ops == ["all_to_all_4D_packed", "all_to_all_4D", "all_to_all_4D"]


def _with_cpp_wrapper() -> list[tuple[str, str]]:
    """The notes of passes that give up exchanges as torch's C++ wrapper would crash on what they put into the graph."""
    switches = {**FUSED, "overlap": True, "absorb": True}
    with torch._inductor.config.patch(cpp_wrapper=True), fvops.compiler.pass_log() as notes:
        for eager, compiled in compare_with_eager(["two branches"], switches, False).values():
            assert eager == compiled
    return [(note.name, note.what) for note in notes]


@pytest.mark.slow
def test_exchanges_stay_whole_under_cpp_wrapper(two_ranks: Ranks) -> None:
    expected = [
        (name, "all_to_all_4D stays whole under cpp_wrapper") for name in ("layout", "overlap") for _ in range(2)
    ]
    assert two_ranks.run(_with_cpp_wrapper, deadline_s=300) == [expected] * 2
