"""Promise 7: torch's own op checks, for every op, with and without gradients; the registrations they look at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fvops
from fvops import compiler
from fvops.debug import record_collectives
from tests.harness import Ranks

OPS = torch.ops.fvops


def _samples(differentiable: bool) -> list[tuple[Any, tuple[Any, ...]]]:
    """Each op with arguments; the tensors require a gradient where the op has one."""
    group = fvops.get_sp_group()
    P, name, rank = group.world_size, group.unique_name, group.rank_in_group

    def make(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, requires_grad=differentiable)

    exchanged = [j + 1 for j in range(P)]
    received = [rank + 1] * P
    with_gradient: list[tuple[Any, tuple[Any, ...]]] = [
        (OPS.all_reduce, (make(3, 4), "sum", P, name)),
        (OPS.all_reduce, (make(3, 4).t(), "avg", P, name)),
        (OPS.all_gather, (make(3, 4), -1, P, name)),
        (OPS.reduce_scatter, (make(3, 2 * P), "sum", 1, P, name)),
        (OPS.reduce_scatter, (make(P, 3), "avg", 0, P, name)),
        (OPS.all_to_all_4D, (make(2, 3, 2 * P, 5), 2, 1, P, name)),
        (OPS.all_to_all_4D, (make(1, 2 * P, 3, 5), 1, 2, P, name)),
        (OPS.all_to_all_4D_coalesced, ([make(2, 3, 2 * P, 5), make(1, 2, P, 3)], 2, 1, P, name)),
        (OPS.all_to_all_4D_packed, ([make(P, 2, 3, 2, 5), make(P, 1, 1, 1, 3)], 2, 1, False, P, name)),
        (OPS.all_to_all_single, (make(2 * P, 3), None, None, P, name)),
        (OPS.all_to_all_single, (make(sum(exchanged), 3), received, exchanged, P, name)),
        (OPS.broadcast, (make(3, 4), 1, P, name)),
        (OPS.reduce, (make(3, 4), "sum", 1, P, name)),
        (OPS.shard, (make(2 * P, 3), 0, True, rank, P, name)),
        (OPS.shard, (make(3, 2 * P), 1, False, rank, P, name)),
    ]
    if differentiable:
        return with_gradient
    return [
        *with_gradient,
        (OPS.all_reduce, (make(3), "max", P, name)),
        (OPS.gather, (make(3, 4), 1, 0, rank, P, name)),
        (OPS.barrier, (P, name)),
        (OPS.elided, (P, name)),
    ]


def _opcheck(differentiable: bool) -> int:
    samples = _samples(differentiable)
    for op, arguments in samples:
        torch.library.opcheck(op.default, arguments)
    return len(samples)


def _opcheck_point_to_point() -> None:
    """A ring: as many messages wait for each rank's recv as its neighbour's opcheck of send has sent."""
    group = fvops.get_sp_group()
    P, name, place = group.world_size, group.unique_name, group.rank_in_group
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    to_next = (torch.rand(3), (place + 1) % P, P, name)
    from_previous = ((3,), torch.float32, torch.device("cpu"), (place - 1) % P, P, name)
    with record_collectives() as sends:
        torch.library.opcheck(OPS.send.default, to_next, test_utils=tests)
    for _ in range(8 - len(sends)):
        group.send(torch.rand(3))
    with record_collectives() as recvs:
        torch.library.opcheck(OPS.recv.default, from_previous, test_utils=tests)
    for _ in range(8 - len(recvs)):
        group.recv((3,), torch.float32)


def test_opcheck(two_ranks: Ranks) -> None:
    assert two_ranks.run(_opcheck, False, deadline_s=300)[0] == 19
    assert two_ranks.run(_opcheck, True, deadline_s=300)[0] == 15
    two_ranks.run(_opcheck_point_to_point)


def test_every_op_that_communicates_is_ordered() -> None:
    from torch._higher_order_ops.effects import _EffectType, _get_effect

    ordered = {op._opname for op in compiler.ordered_ops}
    assert ordered == {
        "all_reduce", "all_gather", "reduce_scatter", "all_to_all_4D", "all_to_all_4D_coalesced", "all_to_all_single",
        "all_to_all_4D_packed", "all_to_all_4D_start", "broadcast", "elided", "reduce", "gather", "send", "recv",
        "barrier",
    }  # fmt: skip
    assert all(_get_effect(op) == _EffectType.ORDERED for op in compiler.ordered_ops)
    assert _get_effect(OPS.shard.default) is None
    assert _get_effect(OPS.all_to_all_4D_wait.default) is None


def test_every_schema_names_its_group_and_world() -> None:
    for op in [*compiler.ordered_ops, OPS.shard.default, OPS.all_to_all_4D_wait.default]:
        arguments = {argument.name: str(argument.type) for argument in op._schema.arguments}
        assert arguments["world_size"] == "int"
        assert arguments["group_name"] == "str"
        # Effects need a schema without aliasing, and an op never returns its input.
        assert not any(argument.alias_info for argument in [*op._schema.arguments, *op._schema.returns])
