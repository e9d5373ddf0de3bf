"""The transport over a collective library's own interface: NCCL through pynccl, HCCL through pyhccl.

Calls go to the current stream, allocate nothing but their results and never wait on the host, so that a CUDA graph can
hold them. Messages between two ranks have communicators of their own (`Lanes`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fvops.device_communicators.flat_transport import FlatTransport, as_bytes, reduced_dtype
from fvops.device_communicators.lanes import Lanes
from fvops.device_communicators.library_communicator import LibraryCommunicator

__all__ = ["LibraryTransport"]


class LibraryTransport(FlatTransport):
    """Flat exchanges over `comm`.

    Args:
        comm: the communicator of the whole group; owned by the caller.
        cpu_group: the process group for `barrier`.
        lanes: the communicators for `send` and `recv`.
        timeout_s: how long `close` waits for open sends, seconds.
    """

    def __init__(self, comm: LibraryCommunicator, cpu_group: dist.ProcessGroup, lanes: Lanes, timeout_s: float) -> None:
        self.comm = comm
        self.cpu_group = cpu_group
        self.device = comm.device
        self.world_size = comm.world_size
        self.name = f"{comm.BACKEND} ({comm.NAME})"
        self._lanes = lanes
        self._timeout_s = timeout_s

    def send(self, input_: Tensor, dst: int) -> None:
        # A copy: the caller may overwrite its tensor as soon as this returns.
        self._lanes.send(as_bytes(input_.clone(memory_format=torch.contiguous_format)), dst)

    def recv(self, output: Tensor, src: int) -> None:
        self._lanes.recv(as_bytes(output), src)

    def barrier(self) -> None:
        dist.barrier(self.cpu_group)

    def give_up(self, reason: str) -> None:
        self._timeout_s = 0.0
        self.comm.abort(reason)

    def close(self) -> None:
        self._lanes.close(self._timeout_s)
        self.comm.destroy()

    def _reduces_as(self, dtype: torch.dtype, reduce_op: str) -> torch.dtype | None:
        for candidate in (dtype, reduced_dtype(dtype)):
            if self.comm.reduces(candidate, reduce_op):
                return candidate
        return None

    def _all_to_all(self, recvs: Sequence[Tensor], sends: Sequence[Tensor]) -> None:
        pairs = [(recv, send) for recv, send in zip(recvs, sends, strict=True) if send.numel()]
        if len(pairs) == 1:
            recv, send = pairs[0]
            self.comm.all_to_all_single(as_bytes(recv), as_bytes(send))
            return
        self.comm.group_start()
        for recv, send in pairs:
            self.comm.all_to_all_single(as_bytes(recv), as_bytes(send))
        self.comm.group_end()

    def _all_to_all_rows(self, recv: Tensor, send: Tensor, recv_rows: Sequence[int], send_rows: Sequence[int]) -> None:
        self.comm.all_to_all_single(recv, send, list(recv_rows), list(send_rows))

    def _all_gather(self, recv: Tensor, send: Tensor) -> None:
        if send.numel():
            self.comm.all_gather(as_bytes(recv), as_bytes(send))

    def _gather(self, recv: Tensor | None, send: Tensor, dst: int) -> None:
        rank, P = self.comm.rank, self.world_size
        sent = as_bytes(send)
        if not sent.numel():
            return
        if recv is None:
            self.comm.send(sent, dst)
            return
        parts = as_bytes(recv).view(P, -1)
        parts[rank].copy_(sent)
        self.comm.group_start()
        for peer in range(P):
            if peer != rank:
                self.comm.recv(parts[peer], peer)
        self.comm.group_end()

    def like(self, input_: Tensor) -> Tensor:
        return self.empty(input_.shape, input_.dtype)

    def all_reduce(self, output: Tensor, input_: Tensor, reduce_op: str) -> None:
        if self._reduces_as(input_.dtype, reduce_op) != input_.dtype:
            super().all_reduce(output, input_, reduce_op)
        elif input_.numel():  # straight from the input, without a copy
            self.comm.all_reduce(input_.contiguous(), reduce_op, out=output)

    def _all_reduce(self, buffer: Tensor, reduce_op: str) -> None:
        if buffer.numel():
            self.comm.all_reduce(buffer, reduce_op, out=buffer)

    def reduce(self, output: Tensor, input_: Tensor, reduce_op: str, dst: int) -> None:
        if self._reduces_as(input_.dtype, reduce_op) != input_.dtype:
            super().reduce(output, input_, reduce_op, dst)
        elif input_.numel():
            self.comm.reduce(input_.contiguous(), dst, reduce_op, out=output)

    def _reduce(self, buffer: Tensor, reduce_op: str, dst: int) -> None:
        if buffer.numel():
            self.comm.reduce(buffer, dst, reduce_op, out=buffer)

    def _reduce_scatter(self, recv: Tensor, send: Tensor, reduce_op: str) -> None:
        if recv.numel():
            self.comm.reduce_scatter(recv.view(-1), send.view(-1), reduce_op)

    def broadcast(self, output: Tensor, input_: Tensor, src: int) -> None:
        if self.comm.rank == src:
            output.copy_(input_)
        super().broadcast(output, input_, src)

    def _broadcast(self, buffer: Tensor, src: int) -> None:
        if buffer.numel():
            self.comm.broadcast(as_bytes(buffer), src)
