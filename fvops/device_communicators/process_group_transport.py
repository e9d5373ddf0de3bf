"""The transport that torch.distributed gives: flat buffers over a process group (gloo, NCCL, HCCL).

Data moves as bytes, so that every dtype travels, whatever the backend's own list of dtypes. Reductions run in the
tensor's dtype where backends know it, and in a wider one that holds it where they do not. Every buffer is contiguous
and the caller's to give away; a call returns when its buffers may be used again (on the current stream, for a GPU).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fvops.torch_compat import all_gather_flat, reduce_scatter_flat

__all__ = ["ProcessGroupTransport", "as_bytes"]

# gloo and NCCL reduce these in no form of their own; the wider dtype represents every value, and casting back rounds
# (floats) or wraps (integers) once.
_REDUCED_AS = {
    torch.bool: torch.uint8,
    torch.int16: torch.int32,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
    torch.float8_e4m3fn: torch.float32,
    torch.float8_e4m3fnuz: torch.float32,
    torch.float8_e5m2: torch.float32,
    torch.float8_e5m2fnuz: torch.float32,
}

# avg is a sum and a division here: not every backend has it.
_C10D_OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}


def as_bytes(buffer: Tensor) -> Tensor:
    """A contiguous tensor's memory as flat uint8."""
    # Not view(-1): a tensor of one element or none counts as contiguous whatever its strides, and keeps them.
    return buffer.as_strided((buffer.numel(),), (1,)).view(torch.uint8)


class ProcessGroupTransport:
    """Flat exchanges over `group`; peers are places in it."""

    def __init__(self, group: dist.ProcessGroup, ranks: Sequence[int]) -> None:
        self.group = group
        self.ranks = list(ranks)
        self.world_size = len(self.ranks)

    def all_to_all(
        self, recv: Tensor, send: Tensor, recv_rows: Sequence[int] | None = None, send_rows: Sequence[int] | None = None
    ) -> None:
        """Part j of `send` goes to peer j, part j of `recv` comes from it: equal parts, or so many rows of dim 0."""
        dist.all_to_all_single(
            as_bytes(recv), as_bytes(send), _row_bytes(recv, recv_rows), _row_bytes(send, send_rows), group=self.group
        )

    def all_gather(self, recv: Tensor, send: Tensor) -> None:
        """`recv` is the peers' `send` one after another."""
        all_gather_flat(as_bytes(recv), as_bytes(send), group=self.group)

    def all_reduce(self, buffer: Tensor, reduce_op: str) -> None:
        """Reduce `buffer` over the peers, in place."""
        wide = _widen(buffer)
        dist.all_reduce(wide, op=_C10D_OPS[reduce_op], group=self.group)
        self._finish(buffer, wide, reduce_op)

    def reduce(self, buffer: Tensor, reduce_op: str, dst: int) -> None:
        """Reduce `buffer` over the peers, in place on `dst`; what it holds elsewhere afterwards is undefined."""
        wide = _widen(buffer)
        dist.reduce(wide, dst=self.ranks[dst], op=_C10D_OPS[reduce_op], group=self.group)
        self._finish(buffer, wide, reduce_op)

    def reduce_scatter(self, recv: Tensor, send: Tensor, reduce_op: str) -> None:
        """`recv` is this rank's part of the reduction of the peers' `send`."""
        wide = _widen(recv, copy=False)
        reduce_scatter_flat(wide.view(-1), _widen(send).view(-1), op=_C10D_OPS[reduce_op], group=self.group)
        self._finish(recv, wide, reduce_op)

    def broadcast(self, buffer: Tensor, src: int) -> None:
        """`buffer` of `src` on every rank, in place."""
        dist.broadcast(as_bytes(buffer), src=self.ranks[src], group=self.group)

    def gather(self, recv: Tensor | None, send: Tensor, dst: int) -> None:
        """On `dst`, `recv` is the peers' `send` one after another; elsewhere it is None."""
        parts = None if recv is None else list(as_bytes(recv).chunk(self.world_size))
        if parts is not None and len(parts) != self.world_size:  # chunk() of an empty tensor gives one part
            parts = [as_bytes(torch.empty_like(send)) for _ in range(self.world_size)]
        dist.gather(as_bytes(send), parts, dst=self.ranks[dst], group=self.group)

    def send(self, buffer: Tensor, dst: int) -> Any:
        """Start sending; the returned work is done when `buffer` may be reused."""
        return dist.isend(as_bytes(buffer), dst=self.ranks[dst], group=self.group)

    def recv(self, buffer: Tensor, src: int) -> None:
        """Fill `buffer` with what `src` sends."""
        dist.recv(as_bytes(buffer), src=self.ranks[src], group=self.group)

    def _finish(self, buffer: Tensor, reduced: Tensor, reduce_op: str) -> None:
        if reduce_op == "avg":
            reduced.div_(self.world_size)
        if reduced is not buffer:
            buffer.copy_(reduced)


def _row_bytes(buffer: Tensor, rows: Sequence[int] | None) -> list[int] | None:
    if rows is None:
        return None
    row = buffer.element_size()
    for size in buffer.shape[1:]:
        row *= size
    return [count * row for count in rows]


def _widen(buffer: Tensor, copy: bool = True) -> Tensor:
    dtype = _REDUCED_AS.get(buffer.dtype)
    if dtype is None:
        return buffer
    return buffer.to(dtype) if copy else torch.empty_like(buffer, dtype=dtype)
