"""Plans of `mover.c`: how the tensors of an exchange are copied, and how the terms of a reduction are cut.

A plan depends on shapes, strides and dtypes alone, so it is made once and kept. Its numbers lie as the structures
`Plan` and `Reduction` of mover.h.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fvops.kernels.parts_plan import Pair, merged_axes

__all__ = ["ExchangePlan", "MoverOptions", "ReductionPlan", "plan_exchange", "plan_reduction"]

_MOST_PLACES, _MOST_TENSORS, _MOST_AXES = 64, 64, 4
# What arithmetic.h can add up; sums of unsigned numbers have the bits of signed ones.
_ARITHMETIC = {
    torch.float32: 0,
    torch.float64: 1,
    torch.int32: 2,
    torch.uint32: 2,
    torch.int64: 3,
    torch.uint64: 3,
    torch.bfloat16: 4,
}


@dataclass(frozen=True)
class MoverOptions:
    """What goes the way in C; the results and the protocol do not depend on it, and ranks may differ.

    Args:
        wanted: False: nothing does.
        shortest_row: bytes; runs of fewer are torch's to copy, whose loops are made for them.
        streamed_bytes: from here on a result is stored past the cache, which saves reading its memory first; what is
            smaller is likely to be in cache still when it is used.
    """

    wanted: bool = True
    shortest_row: int = 32
    streamed_bytes: int = 1 << 20


class ExchangePlan:
    """How one exchange's tensors are copied: `values` are what mover.c reads, `sizes` the bytes of each one's parts."""

    def __init__(self, values: array[int], sizes: list[int], eager: bool) -> None:
        self.values = values
        self.address = values.buffer_info()[0]
        self.sizes = sizes
        self.eager = eager


class ReductionPlan:
    """How a reduction's terms are cut: `values` are what mover.c reads, `own` offset and bytes of this rank's."""

    def __init__(
        self, me: int, arithmetic: int, average: bool, spread: bool, chunk: int, terms: Sequence[tuple[int, int]]
    ) -> None:
        offsets, sizes = zip(*terms, strict=True)
        unused = [0] * (_MOST_PLACES - len(terms))
        self.values = array("q", [arithmetic, average, spread, chunk, *offsets, *unused, *sizes, *unused])
        self.address = self.values.buffer_info()[0]
        self.own = terms[me]
        self._chunk = chunk

    def piece_bytes(self, number: int) -> int:
        """Of a piece of this rank's term."""
        return min(self._chunk, self.own[1] - number * self._chunk)


def plan_exchange(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    eager_bytes: int,
    slot_bytes: int,
    options: MoverOptions,
    can_stream: bool,
) -> ExchangePlan | None:
    """The plan of an exchange of rank-major views; None where it is not for C: many tensors, short rows, nothing."""
    if len(inputs) > _MOST_TENSORS:
        return None
    sizes = [x[0].numel() * x.element_size() for x in inputs]
    eager = max(sizes) <= eager_bytes
    if min(sizes) == 0 or (eager and max(sizes) > slot_bytes):
        return None
    streamed = not eager and sum(sizes) * len(inputs[0]) >= options.streamed_bytes and can_stream
    values = array("q", [len(inputs), eager, streamed])
    for x, y, nbytes in zip(inputs, outputs, sizes, strict=True):
        item = x.element_size()
        values.extend([nbytes, x.stride(0) * item, y.stride(0) * item])
        shape, given, wanted = tuple(x.shape[1:]), x.stride()[1:], y.stride()[1:]
        packed = torch.empty(shape, device="meta").stride()
        for source, target in ((given, wanted), (given, packed), (packed, wanted)):
            row, *axes = merged_axes(Pair(item, shape, source, target, 1))
            if len(axes) > _MOST_AXES or row.size < options.shortest_row:
                return None
            unused = [(1, 0, 0)] * (_MOST_AXES - len(axes))
            values.append(row.size)
            for numbers in zip(*axes, *unused, strict=True):  # sizes, then both sides' strides
                values.extend(numbers)
    return ExchangePlan(values, sizes, eager)


def plan_reduction(
    term: Tensor, reduce_op: str, terms: Sequence[tuple[int, int]], me: int, slot_bytes: int, *, spread: bool
) -> ReductionPlan | None:
    """The plan in which place j's term is ``terms[j]``, offset and bytes; None where it is not for C.

    Args:
        term: shows how they are cut, which goes by shape.
        spread: the reduced pieces go on into the others' results.
    """
    arithmetic = _ARITHMETIC.get(term.dtype)
    ops = ("sum", "avg") if term.is_floating_point() else ("sum",)
    if arithmetic is None or reduce_op not in ops or not term.is_contiguous():
        return None
    chunk = max(nbytes for _, nbytes in terms)
    if chunk > slot_bytes:  # as `channel.pieces` cuts
        row_bytes = term.numel() * term.element_size() // term.size(0)
        chunk = slot_bytes // row_bytes * row_bytes
    if chunk == 0:
        return None
    return ReductionPlan(me, arithmetic, reduce_op == "avg", spread, chunk, terms)
