"""The transport that torch.distributed gives: flat buffers over a process group (gloo, NCCL, HCCL).

Data moves as bytes, so that every dtype travels, whatever the backend's own list of dtypes. Reductions run in the
tensor's dtype where backends know it, and in a wider one that holds it where they do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fvops.device_communicators.flat_transport import FlatTransport, as_bytes
from fvops.device_communicators.pending_sends import PendingSends
from fvops.torch_compat import all_gather_flat, reduce_scatter_flat

__all__ = ["ProcessGroupTransport"]

# avg is a sum and a division here: not every backend has it.
_C10D_OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}


class ProcessGroupTransport(FlatTransport):
    """Flat exchanges over `group`.

    Args:
        group: the process group that carries the tensors.
        cpu_group: the one for `barrier`.
        device: where the tensors live.
        unique_name: the group's name, for messages.
        timeout_s: how long `close` waits for open sends, seconds; the process groups have deadlines of their own.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        cpu_group: dist.ProcessGroup,
        device: torch.device,
        unique_name: str,
        timeout_s: float,
    ) -> None:
        self.group = group
        self.cpu_group = cpu_group
        self.device = device
        self.ranks = dist.get_process_group_ranks(group)
        self.world_size = len(self.ranks)
        self.name = f"torch.distributed ({dist.get_backend(group)})"
        # gloo's send and recv take any address for one in host memory.
        self._through_host = device.type != "cpu" and dist.get_backend(group) == "gloo"
        self._sends = PendingSends(unique_name)
        self._timeout_s = timeout_s
        # On an accelerator a send runs on a stream of the backend: (work, buffer) until it is done.
        self._launched: list[tuple[Any, Tensor]] = []

    def send(self, input_: Tensor, dst: int) -> None:
        # A copy: the caller may overwrite its tensor as soon as this returns.
        if self._through_host:
            buffer = torch.empty(input_.shape, dtype=input_.dtype).copy_(input_)
        else:
            buffer = input_.clone(memory_format=torch.contiguous_format)
        self._sends.raise_failure()
        work: Any = dist.isend(as_bytes(buffer), dst=self.ranks[dst], group=self.group)
        if buffer.device.type == "cpu":
            self._sends.add(work.wait, buffer)
        else:
            self._launched = [launched for launched in self._launched if not launched[0].is_completed()]
            self._launched.append((work, buffer))

    def recv(self, output: Tensor, src: int) -> None:
        buffer = torch.empty(output.shape, dtype=output.dtype) if self._through_host else output
        dist.recv(as_bytes(buffer), src=self.ranks[src], group=self.group)
        if buffer is not output:
            output.copy_(buffer)

    def barrier(self) -> None:
        dist.barrier(self.cpu_group)

    def give_up(self, reason: str) -> None:
        self._timeout_s = 0.0

    def close(self) -> None:
        self._launched.clear()
        self._sends.drain(self._timeout_s)

    def _all_to_all(self, recvs: Sequence[Tensor], sends: Sequence[Tensor]) -> None:
        # All are started before the first is waited for: several tensors are one exchange, as far as torch lets them.
        works = [
            dist.all_to_all_single(as_bytes(recv), as_bytes(send), group=self.group, async_op=True)
            for recv, send in zip(recvs, sends, strict=True)
        ]
        for work in works:
            work.wait()

    def _all_to_all_rows(self, recv: Tensor, send: Tensor, recv_rows: Sequence[int], send_rows: Sequence[int]) -> None:
        dist.all_to_all_single(
            as_bytes(recv), as_bytes(send), _row_bytes(recv, recv_rows), _row_bytes(send, send_rows), group=self.group
        )

    def _all_gather(self, recv: Tensor, send: Tensor) -> None:
        all_gather_flat(as_bytes(recv), as_bytes(send), group=self.group)

    def _gather(self, recv: Tensor | None, send: Tensor, dst: int) -> None:
        parts = None if recv is None else list(as_bytes(recv).chunk(self.world_size))
        if parts is not None and len(parts) != self.world_size:  # chunk() of an empty tensor gives one part
            parts = [as_bytes(torch.empty_like(send)) for _ in range(self.world_size)]
        dist.gather(as_bytes(send), parts, dst=self.ranks[dst], group=self.group)

    def _all_reduce(self, buffer: Tensor, reduce_op: str) -> None:
        dist.all_reduce(buffer, op=_C10D_OPS[reduce_op], group=self.group)
        self._divide(buffer, reduce_op)

    def _reduce(self, buffer: Tensor, reduce_op: str, dst: int) -> None:
        dist.reduce(buffer, dst=self.ranks[dst], op=_C10D_OPS[reduce_op], group=self.group)
        self._divide(buffer, reduce_op)

    def _reduce_scatter(self, recv: Tensor, send: Tensor, reduce_op: str) -> None:
        reduce_scatter_flat(recv.view(-1), send.view(-1), op=_C10D_OPS[reduce_op], group=self.group)
        self._divide(recv, reduce_op)

    def _broadcast(self, buffer: Tensor, src: int) -> None:
        dist.broadcast(as_bytes(buffer), src=self.ranks[src], group=self.group)

    def _divide(self, buffer: Tensor, reduce_op: str) -> None:
        if reduce_op == "avg":
            buffer.div_(self.world_size)


def _row_bytes(buffer: Tensor, rows: Sequence[int]) -> list[int]:
    row = buffer.element_size()
    for size in buffer.shape[1:]:
        row *= size
    return [count * row for count in rows]
