"""overlap: values, gradients and sequences as eager's; what stands between start and wait runs while data travels."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import fvops
from compile_tests.meeting import meet, wait_for
from compile_tests.pass_programs import OVERLAPPED, PROGRAMS, Issued, compare_with_eager, example
from fvops.compiler import pass_log
from fvops.debug import record_collectives
from fvops.graph_report import planned_groups
from tests.harness import Ranks

OVERLAP = {"overlap": True}
_START, _WAIT = "fvops.all_to_all_4D_start", "fvops.all_to_all_4D_wait"


def _compare(names: list[str], switches: dict[str, Any], train: bool, batch: int = 1, **more: Any) -> list[Issued]:
    """What eager and compiled code issued, by turns."""
    sequences = compare_with_eager(names, switches, train, batch, **more)
    return [sequence for pair in sequences.values() for sequence in pair]


def _pairs(sequences: list[Issued]) -> list[tuple[Issued, Issued]]:
    return list(zip(sequences[::2], sequences[1::2], strict=True))


@pytest.mark.slow  # rank 0 of the next test shows the same
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_eager_s_values_and_sequence(two_ranks: Ranks, train: bool) -> None:
    for rank in two_ranks.run(_compare, list(OVERLAPPED), OVERLAP, train, deadline_s=300):
        for eager, overlapped in _pairs(rank):
            assert overlapped == eager


def _beside_others(train: bool) -> tuple[Issued, Issued, int]:
    """Rank 0 splits, rank 1 up to a limit, the others nothing; also how many exchanges this rank splits."""
    limit = (True, 2000, False, False)[fvops.get_sp_group().rank_in_group]
    with pass_log() as notes:
        sequences = _compare(list(OVERLAPPED), {"overlap": limit}, train)
    return sequences[::2], sequences[1::2], sum(note.name == "overlap" for note in notes)


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["inference", "training"])
def test_ranks_that_split_otherwise_stay_in_step(world_size: int, train: bool) -> None:
    results = Ranks.get(world_size).run(_beside_others, train, deadline_s=300)
    for eager, overlapped, _ in results:
        assert overlapped == eager == results[0][0]
    splits = [split for _, _, split in results]
    assert splits[0] > splits[1], splits
    assert splits[2:] == [0] * (world_size - 2)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("layout", ["exchange", "fused"])
def test_every_program_at_every_world_size(world_size: int, train: bool, layout: str) -> None:
    ranks = Ranks.get(world_size)
    for batch in (1, 2):
        for rank in ranks.run(_compare, list(PROGRAMS), {**OVERLAP, "layout": layout}, train, batch, deadline_s=900):
            for eager, overlapped in _pairs(rank):
                assert overlapped == eager


@pytest.mark.slow
def test_dynamic_lengths(two_ranks: Ranks) -> None:
    names = ["two branches", "views", "reduced meanwhile"]
    for rank in two_ranks.run(_compare_dynamic, names, deadline_s=300):
        for eager, overlapped in _pairs(rank):
            assert overlapped == eager


def _compare_dynamic(names: list[str]) -> list[Issued]:
    torch._dynamo.utils.counters.clear()
    sequences = _compare(names, OVERLAP, False, dynamic=True)
    stats = torch._dynamo.utils.counters["stats"]
    assert stats["unique_graphs"] == 1, stats
    return sequences


def _kernels(name: str, switches: dict[str, Any], inductor: dict[str, Any]) -> list[str]:
    """The starts, waits, whole exchanges and matrix products of the generated code, in its order."""
    options = {**fvops.compiler.options(**switches), **inductor}
    compiled = torch.compile(PROGRAMS[name], fullgraph=True, options=options)
    _, (code,) = run_and_get_code(compiled, example())
    return _calls_in(code)


def _calls_in(code: str) -> list[str]:
    calls = re.findall(r"^ *(?:buf\d+ = )?(?:torch\.ops\.|extern_kernels\.)([\w.]+)\(", code, re.MULTILINE)
    return [call.removesuffix(".default") for call in calls]


def test_one_branch_is_projected_while_the_other_travels(two_ranks: Ranks) -> None:
    for kernels in two_ranks.run(_kernels, "two branches", OVERLAP, {}, deadline_s=200):
        assert kernels == [_START, _START, "mm", _WAIT, "mm", _WAIT, "mm"]


def _linear_of_received(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(fvops.get_sp_group().all_to_all_4D(x.sin(), 2, 1).flatten(0, 2), weight, bias).cos()


def _product_of_received(x: Tensor, weight: Tensor) -> Tensor:
    """Without a bias, autograd computes the weight's gradient before that of what was received."""
    return (fvops.get_sp_group().all_to_all_4D(x.sin(), 2, 1).flatten(0, 2) @ weight.T).cos()


@pytest.mark.parametrize(("layout", "op"), [("exchange", "all_to_all_4D"), ("fused", "all_to_all_4D_packed")])
@pytest.mark.parametrize(("program", "product"), [(_linear_of_received, "addmm"), (_product_of_received, "mm")])
def test_a_backward_graph_is_split_too(program: Callable[..., Tensor], product: str, layout: str, op: str) -> None:
    """The gradient of what was received travels while the weight's is computed, wherever autograd puts that.

    In Inductor's schedule, which is the order of the code; nothing stands beside the exchange in forward.
    """
    with torch.device("meta"):
        sizes = ((1, 4, 16, 5), (7, 5), (7,))[: 3 if product == "addmm" else 2]
        inputs = [torch.empty(size, requires_grad=True) for size in sizes]
    with planned_groups(sp_size=2), fvops.compiler.enable(**OVERLAP, layout=layout):
        report = fvops.report(program, *inputs, backward=True)
    looked_at = ("mm", "addmm", op, "all_to_all_4D_start", "all_to_all_4D_wait")
    names = [[kernel.op.split("::")[-1] for kernel in graph.kernels] for graph in report.graphs]
    forward, backward = ([name for name in kernels if name in looked_at] for kernels in names)
    assert forward == [op, product]
    assert backward == ["mm", "all_to_all_4D_start", "mm", "all_to_all_4D_wait"]


def _backward_under(limit: int, symbolic: bool) -> list[str]:
    """The kernels of `_product_of_received`'s backward, without the loops."""
    with torch.device("meta"):
        inputs = [torch.empty(size, requires_grad=True) for size in ((1, 4, 16, 5), (7, 5))]
    if symbolic:
        torch._dynamo.mark_dynamic(inputs[0], 1)
    with planned_groups(sp_size=2), fvops.compiler.enable(overlap=limit):
        report = fvops.report(_product_of_received, *inputs, backward=True)
    return [name for kernel in report.graphs[1].kernels if (name := kernel.op.split("::")[-1])]


@pytest.mark.parametrize("symbolic", [False, True])
def test_the_limit_is_on_what_comes_first_too(symbolic: bool) -> None:
    """What leads to an exchange comes before autograd's other products only if what that holds longer fits, too."""
    gradient = 4 * 16 * 5 * 4  # of what was received, ahead of the weight's; it is sent, and as much is received
    limit = 3 * gradient
    assert _backward_under(limit, symbolic) == ["mm", "all_to_all_4D_start", "mm", "all_to_all_4D_wait"]
    assert _backward_under(limit - 1, symbolic) == ["mm", "mm", "all_to_all_4D"]


def _training_code() -> list[list[str]]:
    """The kernels of the generated code of forward and of backward."""
    x = example().requires_grad_()
    weight, bias = (torch.rand(size, dtype=x.dtype, requires_grad=True) for size in ((7, 5), (7,)))
    compiled = torch.compile(_linear_of_received, fullgraph=True, options=fvops.compiler.options(**OVERLAP))
    _, codes = run_and_get_code(lambda: compiled(x, weight, bias).sum().backward())
    return [_calls_in(code) for code in codes]


@pytest.mark.slow  # the same as above, at real ranks
def test_a_backward_graph_s_code_is_split(two_ranks: Ranks) -> None:
    for _, backward in two_ranks.run(_training_code, deadline_s=200):
        assert backward == ["mm", _START, "mm", _WAIT]


@pytest.mark.slow
@pytest.mark.parametrize("name", OVERLAPPED)
def test_how_many_are_split(two_ranks: Ranks, name: str) -> None:
    for kernels in two_ranks.run(_kernels, name, OVERLAP, {}, deadline_s=200):
        assert kernels.count(_START) == kernels.count(_WAIT) == OVERLAPPED[name][1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "inductor",
    [{"reorder_for_compute_comm_overlap": True}, {"reorder_for_peak_memory": False}, {"memory_planning": True}],
)
def test_inductor_s_own_orders_leave_it_so(two_ranks: Ranks, inductor: dict[str, Any]) -> None:
    for kernels in two_ranks.run(_kernels, "reused memory", OVERLAP, inductor, deadline_s=200):
        assert kernels == [_START, "mm", "mm", "mm", "mm", _WAIT]


@pytest.mark.slow
def test_a_limit_keeps_exchanges_whole(two_ranks: Ranks) -> None:
    nbytes = 4 * 16 * 5 * 8
    # One exchange sends and receives 2 * nbytes: with just that, nothing may be computed ahead of its turn.
    for limit, starts in ((2 * nbytes, 0), (1 << 20, 2)):
        for kernels in two_ranks.run(_kernels, "two branches", {"overlap": limit}, {}, deadline_s=200):
            assert kernels.count(_START) == starts, limit


def _meeting(switches: dict[str, Any]) -> bool:
    """Rank 1 enters the program only once rank 0 has come to what it computes between start and wait."""
    group = fvops.get_sp_group()

    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        y = group.all_to_all_4D(x, 2, 1)
        return y.sin(), meet(x @ x.mT, "met", group.rank_in_group)

    x = torch.rand(1, 4, 4, 4, dtype=torch.float64)
    compiled = torch.compile(program, fullgraph=True, options=fvops.compiler.options(**switches))
    if group.rank_in_group == 1:
        wait_for("met")
    received, _ = compiled(x)
    torch.testing.assert_close(received, group.all_to_all_4D(x, 2, 1).sin())
    return True


def test_compute_runs_while_the_exchange_is_under_way(two_ranks: Ranks) -> None:
    """Without overlap rank 0 would wait in the exchange for rank 1, which waits for what rank 0 computes after it."""
    assert two_ranks.run(_meeting, OVERLAP, deadline_s=200) == [True, True]


def _sequence_of_eager_calls() -> tuple[list[str], list[Any]]:
    """An exchange is started; other calls of the group come before its wait."""
    group = fvops.get_sp_group()
    x = torch.arange(1.0 * 4 * 4 * 3).view(1, 4, 4, 3) + 100 * group.rank_in_group
    arguments = [x], 2, 1, "single", group.world_size, group.unique_name
    with record_collectives() as records:
        ticket = torch.ops.fvops.all_to_all_4D_start(*arguments)
        total = group.all_reduce(x)
        second = torch.ops.fvops.all_to_all_4D_start(*arguments)
        late = torch.ops.fvops.all_to_all_4D_wait(second, *arguments)[0]
        early = torch.ops.fvops.all_to_all_4D_wait(ticket, *arguments)[0]
    want = group.all_to_all_4D(x, 2, 1)
    return [record.op for record in records], [bool((y == want).all()) for y in (early, late)] + [total.sum().item()]


def _start_in_inference_mode(rows: int) -> bool:
    group = fvops.get_sp_group()
    with torch.inference_mode():
        arguments = [torch.rand(1, rows, 4, 64)], 2, 1, "single", group.world_size, group.unique_name
        ticket = torch.ops.fvops.all_to_all_4D_start(*arguments)
        (received,) = torch.ops.fvops.all_to_all_4D_wait(ticket, *arguments)
        return torch.equal(received, group.all_to_all_4D(arguments[0][0], 2, 1)) and received.is_inference()


@pytest.mark.parametrize("rows", [4, 4096])  # through the channels, and into the pool
def test_the_caller_s_inference_mode(two_ranks: Ranks, rows: int) -> None:
    """The thread that carries an exchange out has modes of its own."""
    assert two_ranks.run(_start_in_inference_mode, rows) == [True, True]


def test_calls_meanwhile_keep_their_order(two_ranks: Ranks) -> None:
    results = two_ranks.run(_sequence_of_eager_calls)
    assert results[0] == results[1]
    assert results[0] == (["all_to_all_4D", "all_reduce", "all_to_all_4D"], [True, True, 2 * 1128.0 + 4800])
