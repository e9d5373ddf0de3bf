"""What every transport offers, and the half of it that all transports of flat buffers share: packing and unpacking.

The communicators speak of *rank-major parts*, views ``[P, ...]`` whose first dim is the peer, with whatever strides the
tensor behind them has. A transport that can write straight into a peer's memory takes them as they are; one that moves
flat buffers packs them first (`fvops.kernels.pack`), unless they lie in order already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fvops.kernels import layout
from fvops.kernels.pack import pack, unpack

__all__ = ["FlatTransport", "RefusedError", "as_bytes", "combine", "reduced_dtype"]

# gloo, NCCL and HCCL reduce these in no form of their own; the wider dtype represents every value, and casting back
# rounds (floats) or wraps (integers) once.
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


_COMBINE: dict[str, Callable[..., Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "product": torch.mul,
}


def as_bytes(buffer: Tensor) -> Tensor:
    """A contiguous tensor's memory as flat uint8."""
    # Not view(-1): a tensor of one element or none counts as contiguous whatever its strides, and keeps them.
    return buffer.as_strided((buffer.numel(),), (1,)).view(torch.uint8)


def reduced_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a tensor of `dtype` is reduced where a backend does not know its own."""
    return _REDUCED_AS.get(dtype, dtype)


class RefusedError(RuntimeError):
    """A transport refused a call before it sent anything: the group is as good as before."""


class FlatTransport:
    """Exchanges of rank-major parts over a subclass's exchanges of contiguous buffers.

    Peers are places in the group. Outputs come from `empty` or `like`; inputs may have any strides and are only read.
    A call returns when the inputs may be overwritten and the outputs read (on the current stream, for an accelerator).

    Attributes:
        name: how the transport is called in messages.
    """

    name: str
    device: torch.device
    world_size: int

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for a result."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def like(self, input_: Tensor) -> Tensor:
        """Memory for a result of the input's shape and dtype, for `all_reduce`, `reduce` and `broadcast`.

        Here it holds the input's values already, and they work in place: one allocation and copy in one step.
        """
        return input_.clone(memory_format=torch.contiguous_format)

    def exchange(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        """Parts ``inputs[i][j]`` go to peer j, parts ``outputs[i][j]`` come from it; all i in one exchange."""
        recvs = [layout.receive_buffer(parts) for parts in outputs]
        self._all_to_all(recvs, pack(inputs))
        unpack(recvs, outputs)

    def exchange_4D(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], scatter_dim: int) -> None:
        """`exchange` for ``all_to_all_4D``; tensors ``[B, S, H, D]``, of which `scatter_dim` is cut."""
        self.exchange(*layout.exchange_by_rank(outputs, inputs, scatter_dim, self.world_size))

    def exchange_rows(
        self, output: Tensor, input_: Tensor, output_rows: Sequence[int], input_rows: Sequence[int]
    ) -> None:
        """``input_rows[j]`` rows of dim 0 go to peer j, ``output_rows[j]`` rows of the output come from it."""
        (send,) = pack([input_])
        self._all_to_all_rows(output, send, output_rows, input_rows)

    def all_gather(self, outputs: Tensor, input_: Tensor) -> None:
        """``outputs[j]`` is the input of peer j."""
        recv = layout.receive_buffer(outputs)
        (send,) = pack([input_])
        self._all_gather(recv, send)
        unpack([recv], [outputs])

    def all_gather_along(self, output: Tensor, input_: Tensor, dim: int) -> None:
        """`output` is the peers' inputs, one after another along `dim`."""
        self.all_gather(layout.chunks_by_rank(output, dim, self.world_size), input_)

    def gather(self, outputs: Tensor | None, input_: Tensor, dst: int) -> None:
        """As `all_gather`, on `dst`; elsewhere `outputs` is None."""
        recv = None if outputs is None else layout.receive_buffer(outputs)
        (send,) = pack([input_])
        self._gather(recv, send, dst)
        if recv is not None and outputs is not None:
            unpack([recv], [outputs])

    def all_reduce(self, output: Tensor, input_: Tensor, reduce_op: str) -> None:
        """`output` is the reduction of the peers' inputs."""
        dtype = self._reduces_as(input_.dtype, reduce_op)
        if dtype is None:
            gathered = self.empty((self.world_size, *input_.shape), input_.dtype)
            self.all_gather(gathered, input_)
            combine(output, gathered, reduce_op)
            return
        wide = output if dtype == output.dtype else input_.to(dtype).contiguous()
        self._all_reduce(wide, reduce_op)
        _cast_back(output, wide)

    def reduce(self, output: Tensor, input_: Tensor, reduce_op: str, dst: int) -> None:
        """As `all_reduce`, on `dst`; what the output holds elsewhere is undefined."""
        dtype = self._reduces_as(input_.dtype, reduce_op)
        if dtype is None:
            self.all_reduce(output, input_, reduce_op)
            return
        wide = output if dtype == output.dtype else input_.to(dtype).contiguous()
        self._reduce(wide, reduce_op, dst)
        _cast_back(output, wide)

    def reduce_scatter(self, output: Tensor, inputs: Tensor, reduce_op: str) -> None:
        """`output` is the reduction of the peers' ``inputs[r]``, r being this rank's place."""
        dtype = self._reduces_as(output.dtype, reduce_op)
        if dtype is None:
            received = self.empty(inputs.shape, inputs.dtype)
            self.exchange([received], [inputs])
            combine(output, received, reduce_op)
            return
        wide = output if output.dtype == dtype else torch.empty_like(output, dtype=dtype)
        (send,) = pack([inputs])
        self._reduce_scatter(wide, send.to(dtype), reduce_op)
        _cast_back(output, wide)

    def broadcast(self, output: Tensor, input_: Tensor, src: int) -> None:
        """`output` is the input of `src`."""
        self._broadcast(output, src)

    # What a subclass does with contiguous buffers; the first dim of a `recv` or `send` over all peers is the peer.

    def _reduces_as(self, dtype: torch.dtype, reduce_op: str) -> torch.dtype | None:
        """The dtype in which this transport reduces `dtype`: one that holds all its values.

        None where it has none: then the data is moved, and reduced on this rank.
        """
        return reduced_dtype(dtype)

    def _all_to_all(self, recvs: Sequence[Tensor], sends: Sequence[Tensor]) -> None:
        raise NotImplementedError

    def _all_to_all_rows(self, recv: Tensor, send: Tensor, recv_rows: Sequence[int], send_rows: Sequence[int]) -> None:
        raise NotImplementedError

    def _all_gather(self, recv: Tensor, send: Tensor) -> None:
        raise NotImplementedError

    def _gather(self, recv: Tensor | None, send: Tensor, dst: int) -> None:
        raise NotImplementedError

    def _all_reduce(self, buffer: Tensor, reduce_op: str) -> None:
        raise NotImplementedError

    def _reduce(self, buffer: Tensor, reduce_op: str, dst: int) -> None:
        raise NotImplementedError

    def _reduce_scatter(self, recv: Tensor, send: Tensor, reduce_op: str) -> None:
        raise NotImplementedError

    def _broadcast(self, buffer: Tensor, src: int) -> None:
        raise NotImplementedError

    def send(self, input_: Tensor, dst: int) -> None:
        """Send to peer `dst`. Returns before the receiver has posted, so that a ring may send first."""
        raise NotImplementedError

    def recv(self, output: Tensor, src: int) -> None:
        """Fill `output` with what `src` sends."""
        raise NotImplementedError

    def barrier(self) -> None:
        """Return once every peer has come."""
        raise NotImplementedError

    def waiting_for(self) -> list[int]:
        """The places that this rank waits for at this moment, as far as the transport knows; from any thread."""
        return []

    def give_up(self, reason: str) -> None:
        """The group is broken: wait for nobody any more, and let those know that wait for this rank."""

    def close(self) -> None:
        """Release what is held, after waiting for open sends, at most until the deadline.

        Raises:
            RuntimeError: a send was not received.
        """
        raise NotImplementedError


def combine(output: Tensor, parts: Tensor, reduce_op: str) -> None:
    """`output` is the reduction of ``parts[0]``, ``parts[1]``, ... in this order, in their own dtype."""
    total = parts[0].clone()
    for part in parts[1:]:
        _COMBINE[reduce_op](total, part, out=total)
    output.copy_(total.div_(len(parts)) if reduce_op == "avg" else total)


def _cast_back(output: Tensor, reduced: Tensor) -> None:
    if reduced is not output:
        output.copy_(reduced)
