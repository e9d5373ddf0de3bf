"""The transport over symmetric GPU memory: exchanges go one-sided (`fvops.kernels.push`), all else through another one.

Results are tensors of the caller's allocator, copied out of the symmetric buffer: under capture they so belong to the
graph's pool, and a buffer can be used again by the next exchange but one whatever the caller still holds.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fvops import envs
from fvops.device_communicators.flat_transport import FlatTransport, RefusedError
from fvops.device_communicators.library_streams import Streams, let_thread_query_during_capture
from fvops.device_communicators.symmetric_buffer import SymmetricBuffer, TorchSymmetricBuffer
from fvops.device_communicators.symmetric_creation import agree, form_buffers
from fvops.device_communicators.symmetric_watchdog import SymmetricWatchdog
from fvops.kernels import layout
from fvops.kernels.push_plan import SLOTS, slot_bytes_for
from fvops.logger import init_logger
from fvops.node import is_the_same_node_as

__all__ = ["SymmetricTransport"]

logger = init_logger(__name__)

# What a group begins with: both slots and the words are within the 2 MB that CUDA allocates at least.
_FIRST_SLOT_BYTES = 512 << 10


class SymmetricTransport(FlatTransport):
    """One-sided exchanges of up to ``FVOPS_SYMM_SLOT_MB``; larger ones and all other collectives go through `base`.

    Made by `create`. The buffer grows in the first exchange that needs it to, outside captures; a graph keeps the
    buffer that it was captured with.

    Attributes:
        base: the other transport.
        op: the collective that is being issued, for messages; set by the communicator.
    """

    def __init__(
        self,
        base: FlatTransport,
        cpu_group: dist.ProcessGroup,
        unique_name: str,
        streams: Streams,
        kind: type[SymmetricBuffer],
        buffer: SymmetricBuffer,
        timeout_s: float,
    ) -> None:
        self.base = base
        self.device, self.world_size = base.device, base.world_size
        self.name = f"symmetric memory, else {base.name}"
        self.op = "exchange"
        self._cpu_group, self._unique_name, self._streams, self._kind = cpu_group, unique_name, streams, kind
        self._deadline_s = timeout_s
        self._most_bytes = envs.FVOPS_SYMM_SLOT_MB << 20
        self._buffer = buffer
        self._captured = False
        self._kept: list[SymmetricBuffer] = []
        self._last_stream: Any = None
        prepare = let_thread_query_during_capture if streams.asynchronous else lambda: True
        self._watchdog = SymmetricWatchdog(unique_name, self._deadline_s, prepare)
        self._watchdog.follow(buffer)

    @classmethod
    def create(
        cls,
        base: FlatTransport,
        cpu_group: dist.ProcessGroup,
        unique_name: str,
        streams: Streams,
        kind: type[SymmetricBuffer] = TorchSymmetricBuffer,
        timeout_s: float | None = None,
    ) -> tuple[SymmetricTransport | None, str]:
        """The transport and what was set up, or None and why not; alike on all ranks. Collective.

        The ranks must share a node, map each other's memory, and get from a first exchange what `base` gives them.
        """
        timeout_s = envs.FVOPS_TIMEOUT_S if timeout_s is None else timeout_s
        refusal = agree(cpu_group, kind.refusal(base.device) or _no_triton())
        if not refusal and not all(is_the_same_node_as(cpu_group)):
            refusal = "the ranks are on different nodes"
        if refusal:
            return None, refusal
        buffer, refusal = form_buffers(kind, cpu_group, base.device, _FIRST_SLOT_BYTES, timeout_s)
        if buffer is None:
            return None, refusal
        transport = cls(base, cpu_group, unique_name, streams, kind, buffer, timeout_s)
        for number in range(SLOTS):
            refusal = agree(cpu_group, transport._proof(number))
            if refusal:
                logger.warning("group %r: exchanges on symmetric memory are not used: %s", unique_name, refusal)
                transport._release()
                return None, refusal
        return transport, f"{transport.name}; exchanges of up to {transport._most_bytes >> 20} MB are one-sided"

    def exchange(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        # All that is decided here depends on shapes, dtypes and agreed state: the same on all ranks.
        self._watchdog.raise_if_broken()
        needed = slot_bytes_for([output.numel() * output.element_size() for output in outputs])
        if needed > self._most_bytes or (needed > self._buffer.room.slot_bytes and not self._grow(needed)):
            self.base.exchange(outputs, inputs)
        elif needed:
            self._push(outputs, inputs)

    def _push(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        from fvops.kernels import push

        self._follow_stream()
        self._captured = self._captured or self._streams.capturing()
        self._watchdog.last_call = f"{self.op} of " + ", ".join(f"{tuple(x.shape[1:])} {x.dtype}" for x in inputs)
        push.exchange(self._buffer.room, outputs, [x.resolve_conj().resolve_neg() for x in inputs])

    def _follow_stream(self) -> None:
        """Exchanges share the slots, so they run in the order of the calls, whatever streams the caller uses."""
        stream, last = self._streams.resolve(self.op, self._unique_name, None), self._last_stream
        self._last_stream = stream
        if last is None or stream == last:
            return
        with self._streams.use(last):
            was_capturing = self._streams.capturing()
        # Between a capture and what is outside it the caller orders the streams, as `graph_capture` does.
        if was_capturing == self._streams.capturing():
            stream.wait_stream(last)

    def _grow(self, needed: int) -> bool:
        """Have slots of `needed` bytes; False, on all ranks, when there is no memory for them. Collective."""
        size = self._buffer.room.slot_bytes
        if self._streams.capturing():
            raise RefusedError(
                f"results of {needed} bytes do not fit into the symmetric buffer's slots of {size} bytes, which "
                "cannot grow inside a CUDA-graph capture; call the group's warmup(shapes, dtype) with these shapes on "
                "every rank before capturing"
            )
        while size < needed:
            size *= 2
        # What is under way in the old buffer ends on every rank before form_buffers agrees.
        self._synchronize()
        buffer, refusal = form_buffers(
            self._kind, self._cpu_group, self.device, min(size, self._most_bytes), self._deadline_s
        )
        if buffer is None:
            self._most_bytes = self._buffer.room.slot_bytes
            logger.warning(
                "group %r: exchanges of more than %d bytes go through %s: %s",
                self._unique_name,
                self._most_bytes,
                self.base.name,
                refusal,
            )
            return False
        if self._captured:
            self._kept.append(self._buffer)
        else:
            self._watchdog.forget(self._buffer)
        self._watchdog.follow(buffer)
        self._buffer, self._captured = buffer, False
        return True

    def _proof(self, number: int) -> str:
        """Exchange a little both ways, for one of the slots; empty when the results agree, else what went wrong.

        It also has `base` make its connections, outside a capture, for exchanges that are too large later.
        """
        P, place = self.world_size, dist.get_rank(self._cpu_group)
        try:
            x = torch.arange(96 * P, dtype=torch.float32, device=self.device).view(2, 3, 2 * P, 8)
            x += 1000 * (place + number)
            got, wanted = (x.new_zeros(2, 3 * P, 2, 8) for _ in range(2))
            self.base.exchange([layout.sequence_by_rank(wanted, P)], [layout.heads_by_rank(x, P)])
            self._push([layout.sequence_by_rank(got, P)], [layout.heads_by_rank(x, P)])
            if torch.equal(got, wanted):
                return ""
            self._watchdog.raise_if_broken()
        except Exception as error:  # compiling for a GPU that nobody has tried can fail in any way
            return f"a first exchange failed: {type(error).__name__}: {error}"
        return f"a first exchange gave other values than {self.base.name}"

    def _synchronize(self) -> None:
        if self._streams.asynchronous:
            torch.accelerator.synchronize(self.device)

    def _release(self) -> None:
        self._synchronize()
        self._watchdog.stop()
        self._kept.clear()

    def give_up(self, reason: str) -> None:
        self.base.give_up(reason)

    def close(self) -> None:
        self._release()
        self.base.close()

    # What goes through the other transport

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self.base.empty(shape, dtype)

    def like(self, input_: Tensor) -> Tensor:
        return self.base.like(input_)

    def exchange_rows(
        self, output: Tensor, input_: Tensor, output_rows: Sequence[int], input_rows: Sequence[int]
    ) -> None:
        self.base.exchange_rows(output, input_, output_rows, input_rows)

    def all_gather(self, outputs: Tensor, input_: Tensor) -> None:
        self.base.all_gather(outputs, input_)

    def gather(self, outputs: Tensor | None, input_: Tensor, dst: int) -> None:
        self.base.gather(outputs, input_, dst)

    def all_reduce(self, output: Tensor, input_: Tensor, reduce_op: str) -> None:
        self.base.all_reduce(output, input_, reduce_op)

    def reduce(self, output: Tensor, input_: Tensor, reduce_op: str, dst: int) -> None:
        self.base.reduce(output, input_, reduce_op, dst)

    def reduce_scatter(self, output: Tensor, inputs: Tensor, reduce_op: str) -> None:
        self.base.reduce_scatter(output, inputs, reduce_op)

    def broadcast(self, output: Tensor, input_: Tensor, src: int) -> None:
        self.base.broadcast(output, input_, src)

    def send(self, input_: Tensor, dst: int) -> None:
        self.base.send(input_, dst)

    def recv(self, output: Tensor, src: int) -> None:
        self.base.recv(output, src)

    def barrier(self) -> None:
        self.base.barrier()


def _no_triton() -> str:
    return "" if importlib.util.find_spec("triton") is not None else "triton is not installed"
