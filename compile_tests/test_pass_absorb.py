"""absorb: which kernels are gone, counted on planned ranks; values, gradients and sequence as eager's, on real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fvops
from compile_tests.pass_programs import ABSORBED, Issued, compare_with_eager
from fvops.compiler import pass_log
from fvops.graph_report import Graph, Report, planned_groups
from tests.harness import Ranks
from tools.ulysses_blocks import UlyssesBlock

MERGED: dict[str, Any] = {"layout": "fused", "merge": True}
ABSORBING: dict[str, Any] = {**MERGED, "absorb": True}
# Wan 2.1 1.3B: 12 heads of 128.
HEADS, HEAD_SIZE = 12, 128


def _report(switches: dict[str, Any], world_size: int = 2, dtype: torch.dtype = torch.float32, **how: Any) -> Report:
    """Of one block at Wan's width, 48 tokens a rank."""
    torch._dynamo.reset()  # what it knows of the block's sizes from other tests, it would take for symbols
    with torch.device("meta"):
        block = UlyssesBlock(HEADS, HEAD_SIZE).to(dtype)
        inputs = [torch.empty(size, dtype=dtype) for size in block.input_sizes(how.pop("batch", 1), 48)]
    with planned_groups(sp_size=world_size), fvops.compiler.enable(**switches):
        return fvops.report(block, *inputs, **how)


def _layouts(graph: Graph) -> list[set[str]]:
    """What stands on either side of each layout kernel."""
    return [{place.split("::")[-1] for place in kernel.beside} for kernel in graph.layout_kernels]


def _kinds(graph: Graph) -> list[str]:
    return [kernel.op.split("::")[-1] or kernel.kind for kernel in graph.kernels]


EXCHANGE, ATTENTION = "all_to_all_4D_packed", "_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_block_s_forward_has_no_layout_kernel(world_size: int) -> None:
    report = _report(ABSORBING, world_size)
    [graph] = report.graphs
    assert _kinds(graph) == ["addmm", "addmm", "fused", "baddbmm", EXCHANGE, ATTENTION, EXCHANGE, "sum_of_products"]
    assert [len(one.shapes) for one in report.collectives] == [3, 1]
    assert not report.breaks


@pytest.mark.parametrize(
    "backward", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forward", "with backward"]
)
def test_the_same_at_a_length_that_is_a_symbol(backward: bool) -> None:
    """The graph of the second length is for all but the first, and as good as the first's."""
    torch._dynamo.reset()
    with torch.device("meta"):
        block = UlyssesBlock(HEADS, HEAD_SIZE)
    reports = []
    with planned_groups(sp_size=2), fvops.compiler.enable(**ABSORBING):
        for tokens in (48, 56):
            inputs = [torch.empty(size, device="meta") for size in block.input_sizes(1, tokens)]
            if reports:  # torch refuses to make a number of it
                torch._dynamo.mark_dynamic(inputs[0], 1)
            reports.append(fvops.report(block, *inputs, backward=backward))
    torch._dynamo.reset()
    first, second = reports
    for one, other in zip(first.graphs, second.graphs, strict=True):
        assert _kinds(other) == _kinds(one)
        assert _layouts(other) == _layouts(one)


def test_without_absorb_what_remains_stands_next_to_a_gemm() -> None:
    [graph] = _report(MERGED).graphs
    assert len(graph.collectives) == 2
    assert _layouts(graph) == [{"addmm", EXCHANGE}] * 2


def test_forward_and_backward_together() -> None:
    """Backward: one, of attention's logarithms (4 bytes a row and head), which SDPA's backward wants in order."""
    forward, backward = _report(ABSORBING, backward=True).graphs
    assert _layouts(forward) == []
    assert _layouts(backward) == [{ATTENTION + "_backward"}]
    assert [len(graph.collectives) for graph in (forward, backward)] == [2, 2]
    plain_forward, plain_backward = _report(MERGED, backward=True).graphs
    assert (len(_layouts(plain_forward)), len(_layouts(plain_backward))) == (2, 3)
    # to_out's input's gradient becomes one bmm; the gradients of to_out's and to_v's weights two products each.
    assert _kinds(backward).count("bmm") == 1
    assert _kinds(backward).count("mm") == _kinds(plain_backward).count("mm") - 1 + 2


@pytest.mark.parametrize("layout", ["auto", "exchange"])
def test_an_exchange_that_stays_whole_is_left_alone(layout: str) -> None:
    report = _report({**ABSORBING, "layout": layout})
    assert report.layout_kernels == []
    assert not any("absorb:" in line for line in report.passes)


def test_half_types_are_summed_in_one_product() -> None:
    """Only the write side, where each element still is one product's."""
    [graph] = _report(ABSORBING, dtype=torch.bfloat16).graphs
    assert _layouts(graph) == [{EXCHANGE, "addmm"}]
    assert "baddbmm" in _kinds(graph)
    assert "sum_of_products" not in _kinds(graph)


def test_what_is_read_elsewhere_is_laid_down_once() -> None:
    """A received tensor that is also returned has to be unpacked: then the projection reads that."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> Any:
            y = fvops.get_sp_group().all_to_all_4D(x, 1, 2).flatten(2)
            return y, self.out(y)

    with torch.device("meta"):
        module, x = Both(), torch.empty(1, 8, 4, 8)
    with planned_groups(sp_size=2), fvops.compiler.enable(**ABSORBING):
        report = fvops.report(module, x)
    assert not any("absorb:" in line for line in report.passes)
    assert len(report.layout_kernels) == 1


def test_a_report_tells_what_the_passes_did() -> None:
    lines = _report(ABSORBING, backward=True).passes
    told = [line.split(", at ")[0] for line in lines if "absorb:" in line or "merge:" in line]
    assert told == [
        "graph 0 (whole): absorb: 1 x addmm reads the 2 parts that all_to_all_4D received",
        "graph 0 (whole): absorb: 1 x mm reads the 2 parts that all_to_all_4D received",
        "graph 0 (whole): absorb: 1 x mm reads the 2 parts that all_to_all_4D received",
        "graph 0 (forward): absorb: 1 x addmm writes the buffer that all_to_all_4D sends",
        "graph 0 (forward): merge: 3 x all_to_all_4D as one exchange of 3 tensors",
        "graph 0 (backward): absorb: 1 x mm writes the buffer that all_to_all_4D sends",
        "graph 0 (backward): merge: 3 x all_to_all_4D as one exchange of 3 tensors",
    ]
    assert all("ulysses_blocks.py" in line for line in lines)


def _compare(
    names: list[str], train: bool, batch: int = 1, dynamic: bool | None = None
) -> tuple[dict[str, tuple[Issued, Issued]], int, int]:
    """What eager and compiled code issued; how many products read parts, and how many write packed buffers."""
    torch._dynamo.reset()
    with pass_log() as notes:
        found = compare_with_eager(names, {"layout": "fused", "absorb": True}, train, batch, dynamic=dynamic)
    absorbed = [note.what for note in notes if note.name == "absorb"]
    return found, sum("reads" in what for what in absorbed), sum("writes" in what for what in absorbed)


def _check(ranks: Ranks, names: list[str], train: bool, batch: int = 1, dynamic: bool | None = None) -> None:
    read, written = (sum(ABSORBED[name][1 + side] for name in names) for side in range(2))
    for found, reads, writes in ranks.run(_compare, names, train, batch, dynamic, deadline_s=400):
        for name, (eager, compiled) in found.items():
            assert compiled == eager, name
        if dynamic:
            continue  # H and D are symbols then: such an exchange is left alone, unless a guard makes numbers of them
        if not train:
            assert (reads, writes) == (read, written)
        else:
            assert reads > read


# One that reads parts, one that writes packed buffers. All of them are slow: ten programs' kernels take g++ most of a
# minute.
QUICK = ["projected with a bias", "projected before with a bias"]


def test_values_gradients_and_sequence(two_ranks: Ranks) -> None:
    _check(two_ranks, QUICK, train=True)


def test_a_bias_of_one_number_is_left_alone(two_ranks: Ranks) -> None:
    _check(two_ranks, ["projected before with one number"], train=False)


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_at_other_world_sizes_and_lengths(world_size: int, train: bool) -> None:
    for batch in (1, 2):
        for dynamic in (False, True):
            _check(Ranks.get(world_size), list(ABSORBED), train, batch, dynamic)
