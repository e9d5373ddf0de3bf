"""merge and cancel: values and gradients as eager's, and the sequence of collectives that each pass promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fvops
from compile_tests.pass_programs import CANCELLED, KEPT, MERGED, PROGRAMS, Issued, compare_with_eager, example
from fvops.debug import record_collectives
from tests.harness import Ranks

MERGE, CANCEL = {"merge": True}, {"cancel": True}


def _compare(
    names: list[str], switches: dict[str, Any], train: bool, batch: int = 1, dynamic: bool | None = None
) -> dict[str, tuple[Issued, Issued]]:
    return compare_with_eager(names, switches, train, batch, dynamic=dynamic)


def _alike(results: list[Any]) -> dict[str, tuple[Issued, Issued]]:
    assert all(result == results[0] for result in results)
    return results[0]


def _exchanges(sequence: Issued) -> Issued:
    return [call for call in sequence if call[0].startswith("all_to_all_4D")]


def _tensors(sequence: Issued) -> list[tuple[Any, ...]]:
    """The exchanges with each grouped one taken apart."""
    return [(shape, arguments) for _, shapes, arguments in _exchanges(sequence) for shape in shapes]


def test_merged_are_neighbours_that_do_not_read_each_other(two_ranks: Ranks) -> None:
    results = _alike(two_ranks.run(_compare, list(MERGED), MERGE, False, deadline_s=300))
    for name, (eager, merged) in results.items():
        assert [len(shapes) for _, shapes, _ in _exchanges(merged)] == MERGED[name][1], name
        assert _tensors(merged) == _tensors(eager), name


def test_merge_in_backward(two_ranks: Ranks) -> None:
    eager, merged = _alike(two_ranks.run(_compare, ["q, k and v"], MERGE, True, deadline_s=300))["all"]
    assert len(_exchanges(eager)) == 8
    assert [len(shapes) for _, shapes, _ in _exchanges(merged)] == [3, 1, 1, 3]


@pytest.mark.parametrize("reads_the_first", [True, False])
def test_random_draws_keep_their_order(two_ranks: Ranks, reads_the_first: bool) -> None:
    """What is drawn for what was received comes before what is drawn for the second exchange, as in eager."""
    exchanges = two_ranks.run(_drawn_between, reads_the_first, deadline_s=300)
    assert exchanges == [2 if reads_the_first else 1] * 2


def _drawn_between(reads_the_first: bool) -> int:
    """How many exchanges are issued; values are as eager's, with eager's generator."""
    group = fvops.get_sp_group()

    def program(x: torch.Tensor) -> torch.Tensor:
        y = group.all_to_all_4D(x, 2, 1)
        first = torch.poisson(y if reads_the_first else x)
        return y.sin() * first.view(y.shape) + group.all_to_all_4D(torch.rand_like(x) + x, 2, 1)

    # In torch 2.11 a pass of its own draws out of order.
    own = {"fallback_random": True, "reorder_for_locality": False}
    options = {**fvops.compiler.options(merge=True), **own}
    compiled = torch.compile(program, fullgraph=True, options=options)
    x = example()
    torch.manual_seed(7)
    expected = program(x)
    torch.manual_seed(7)
    with record_collectives() as records:
        got = compiled(x)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    return len(records)


@pytest.mark.parametrize("is_read", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_write_in_place_is_not_passed(two_ranks: Ranks, is_read: bool) -> None:
    """What reads the first received tensor and what is overwritten before the second exchange reads the old values.

    If nothing reads it, what is sent must still be sent before the write.
    """
    assert two_ranks.run(_written_between, is_read, deadline_s=300) == [2, 2]


def _written_between(is_read: bool) -> int:
    """How many exchanges are issued; values are as eager's."""
    group = fvops.get_sp_group()

    def program(x: torch.Tensor, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = group.all_to_all_4D(x.sin(), 2, 1)
        read = (first if is_read else x).mean() * buffer
        buffer.add_(1)
        return read, group.all_to_all_4D(x.cos(), 2, 1)

    def write_at_once(graph: torch.fx.Graph) -> None:
        """AOTAutograd puts the write to the end: have it where the program has it."""
        (write,) = (node for node in graph.nodes if node.target is torch.ops.aten.copy_.default)
        cos = next(node for node in graph.nodes if node.target is torch.ops.aten.cos.default)
        cos.prepend(write.args[1])
        cos.prepend(write)

    options = {**fvops.compiler.options(merge=True), "post_grad_custom_pre_pass": write_at_once}
    compiled = torch.compile(program, fullgraph=True, options=options)
    x, results = example(), []
    for function in (program, compiled):
        buffer = x.exp()
        with record_collectives() as records:
            results.append((*function(x, buffer), buffer))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
    return len(records)


@pytest.mark.slow
@pytest.mark.parametrize(("tensors", "sizes"), [(2, [2, 1, 1]), (0.5, [1, 1, 1, 1])])
def test_a_limit_ends_a_merged_exchange(two_ranks: Ranks, tensors: float, sizes: list[int]) -> None:
    nbytes = int(tensors * 4 * 16 * 5 * 8)
    merged = _alike(two_ranks.run(_compare, ["q, k and v"], {"merge": nbytes}, False, deadline_s=300))["q, k and v"][1]
    assert [len(shapes) for _, shapes, _ in merged] == sizes


@pytest.mark.slow
def test_cancelled_pairs_leave_nothing(two_ranks: Ranks) -> None:
    results = _alike(two_ranks.run(_compare, list(CANCELLED), CANCEL, False, deadline_s=300))
    for name, (eager, left) in results.items():
        assert len(eager) >= 2, name
        assert left == [], name


@pytest.mark.slow
def test_cancelled_pairs_leave_nothing_in_forward_and_backward(two_ranks: Ranks) -> None:
    eager, left = _alike(two_ranks.run(_compare, list(CANCELLED), CANCEL, True, deadline_s=300))["all"]
    assert len(_exchanges(eager)) >= 4 * len(CANCELLED)
    assert _exchanges(left) == []


@pytest.mark.slow
def test_cancelled_at_dynamic_lengths_too(two_ranks: Ranks) -> None:
    """A rank that met one length alone has numbers where others have symbols, and may not decide otherwise."""
    eager, left = _alike(two_ranks.run(_compare, list(CANCELLED), CANCEL, True, 1, True, deadline_s=300))["all"]
    assert len(_exchanges(eager)) >= 2 * 4 * len(CANCELLED)
    assert _exchanges(left) == []


@pytest.mark.parametrize("with_gradient", [pytest.param(False, marks=pytest.mark.slow), True])
def test_an_input_that_is_overwritten_is_not_exchanged_anew(two_ranks: Ranks, with_gradient: bool) -> None:
    """Backward would compute from the new values what forward had computed from the old ones."""
    assert two_ranks.run(_overwriting, with_gradient, deadline_s=300) == [2, 2]


def _overwriting(with_gradient: bool) -> int:
    """How many exchanges of the forward pass stay; gradients are as eager's."""
    group = fvops.get_sp_group()

    def program(x: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        result = group.all_to_all_4D(group.all_to_all_4D(buffer * 2, 2, 1).sin(), 1, 2) * x
        buffer.add_(1)
        return result

    compiled = torch.compile(program, fullgraph=True, options=fvops.compiler.options(cancel=True))
    gradients = []
    for function in (program, compiled):
        x, source = example().requires_grad_(), example().requires_grad_(with_gradient)
        buffer = source.cos()
        with record_collectives() as records:
            result = function(x, buffer)
        sources = [x, source] if with_gradient else [x]
        gradients.append(torch.autograd.grad(result.sum() + buffer.sin().sum(), sources))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)
    return len(records)


def test_what_is_not_undone_stays(two_ranks: Ranks) -> None:
    results = _alike(two_ranks.run(_compare, list(KEPT), CANCEL, False, deadline_s=300))
    for name, (_, left) in results.items():
        assert len(_exchanges(left)) == KEPT[name][1], name


def test_both_at_dynamic_lengths(two_ranks: Ranks) -> None:
    names = ["q, k and v", "elementwise", "read before the second"]
    _alike(two_ranks.run(_compare_dynamic, names, deadline_s=300))


def _compare_dynamic(names: list[str]) -> list[list[int]]:
    torch._dynamo.utils.counters.clear()
    results = compare_with_eager(names, {"merge": True, "cancel": True}, False, dynamic=True)
    stats = torch._dynamo.utils.counters["stats"]
    assert stats["unique_graphs"] == 1, stats
    # Both lengths are in the sequences; `compare_with_eager` cuts them at the first length's barriers.
    return [[len(shapes) for _, shapes, _ in merged] for _, merged in results.values()]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [3, 4])
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("switches", [MERGE, CANCEL, {}], ids=["merge", "cancel", "all"])
def test_every_program_at_other_world_sizes(world_size: int, train: bool, switches: dict[str, Any]) -> None:
    ranks = Ranks.get(world_size)
    for batch in (1, 2):
        _alike(ranks.run(_compare, list(PROGRAMS), switches, train, batch, deadline_s=900))
