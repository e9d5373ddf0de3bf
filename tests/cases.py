"""One collective call as data, run on every rank with the promises that hold for all of them checked on the way.

The promises: the result is a new tensor with the strides of a newly allocated one, of the input's dtype and device; the
input's memory is as it was; and a later call leaves an earlier result alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.draws import bits, make, storage_bits
from tests.harness import Ranks

__all__ = ["ENTRIES", "REDUCE_OPS", "Case", "agree", "run"]

ENTRIES = ("coordinator", "op", "communicator")

REDUCE_OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.AVG,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}


@dataclass(frozen=True)
class Case:
    """A call of `op` through `entry`; rank r's input is ``make(shapes[r], dtype, layouts[r], seed + 100 * r)``.

    Attributes:
        args: the op's arguments by the coordinator's names; a list under "by_rank" holds different ones for each rank.
    """

    op: str
    entry: str
    shapes: Sequence[Sequence[int]]
    dtype: torch.dtype
    layouts: Sequence[str]
    seed: int
    args: dict[str, Any] = field(default_factory=dict)
    numbers: bool = False

    def input(self, rank: int, call: int = 0) -> Tensor:
        """Rank `rank`'s input in the case's first or second call."""
        seed = self.seed + 100 * rank + 10_000 * call
        return make(self.shapes[rank], self.dtype, self.layouts[rank], seed, numbers=self.numbers)

    def inputs(self) -> list[Tensor]:
        """All ranks' inputs of the first call."""
        return [self.input(rank).contiguous() for rank in range(len(self.shapes))]


def run(world_size: int, case: Case) -> list[Tensor | None]:
    """The ranks' results of `case`; fails when any rank broke a promise."""
    replies = Ranks.get(world_size).run(_run, case)
    broken = [f"rank {rank}: {text}" for rank, (_, complaints) in enumerate(replies) for text in complaints]
    assert not broken, (case, broken)
    return [result for result, _ in replies]


def agree(case: Case, results: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """Fail unless every rank's result is bit for bit the expected one."""
    for rank, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        if wanted is None:
            assert result is None, (case, rank)
        else:
            assert result is not None, (case, rank)
            assert result.shape == wanted.shape, (case, rank, result.shape, wanted.shape)
            assert torch.equal(bits(result), bits(wanted)), (case, rank, result, wanted)


def _run(case: Case) -> tuple[Tensor | None, list[str]]:
    import fvops

    group = fvops.get_sp_group()
    rank = group.rank_in_group
    x = case.input(rank)
    before = storage_bits(x)
    result = _call(group, case, x)
    complaints = _complaints(case, x, before, result)
    kept = None if result is None else result.clone()
    _call(group, case, case.input(rank, call=1))
    if kept is not None and not torch.equal(bits(kept), bits(result)):
        complaints.append("the second call changed the first one's result")
    return kept, complaints


def _complaints(case: Case, x: Tensor, before: Tensor, result: Tensor | None) -> list[str]:
    complaints = []
    if not torch.equal(storage_bits(x), before):
        complaints.append("the input's memory was written")
    if result is None:
        return complaints
    if result.stride() != torch.empty(result.shape).stride():
        complaints.append(f"strides {result.stride()} for shape {tuple(result.shape)}")
    if (result.dtype, result.device) != (x.dtype, x.device):
        complaints.append(f"result is {result.dtype} on {result.device}, input {x.dtype} on {x.device}")
    if result is x or (x.numel() and result.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()):
        complaints.append("the result shares the input's memory")
    return complaints


def _call(group: Any, case: Case, x: Tensor) -> Tensor | None:
    args = dict(case.args)
    args = args.pop("by_rank")[group.rank_in_group] if "by_rank" in args else args
    if case.entry == "op":
        return _call_op(group, case.op, x, args)
    if "op" in args:
        args["op"] = REDUCE_OPS[args["op"]]
    target = group if case.entry == "coordinator" else group.device_communicator
    return getattr(target, case.op)(x, **args)


def _call_op(group: Any, op: str, x: Tensor, args: dict[str, Any]) -> Tensor | None:
    rank, tail = group.rank_in_group, (group.world_size, group.unique_name)
    ordered = {
        "all_reduce": ("op",),
        "reduce": ("op", "dst"),
        "reduce_scatter": ("op", "dim"),
        "all_gather": ("dim",),
        "gather": ("dst", "dim"),
        "shard": ("dim", "scale_grad"),
        "broadcast": ("src",),
        "all_to_all_4D": ("scatter_dim", "gather_dim"),
        "all_to_all_single": ("output_split_sizes", "input_split_sizes"),
    }[op]
    values = [args.get(name) for name in ordered]
    if op in ("gather", "shard"):
        values.append(rank)
    result = getattr(torch.ops.fvops, op)(x, *values, *tail)
    if op == "gather" and rank != args["dst"]:
        assert result.shape == (0,), f"gather off dst gives shape (0,), got {tuple(result.shape)}"
        return None
    return result
