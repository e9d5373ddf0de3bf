"""A group's collectives over shared memory: what the communicator calls.

Each call is turned into parts by place, and handed to `exchange` (what moves) or `reductions` (what is computed). All
calls but `send` and `recv` take turns, in the same order on every rank; which thread calls does not matter.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from fvops import envs
from fvops.device_communicators.shm.arithmetic import REDUCTIONS
from fvops.device_communicators.shm.channel import Inlet, Outlet
from fvops.device_communicators.shm.counters import Counters
from fvops.device_communicators.shm.creation import Formation, form_segments
from fvops.device_communicators.shm.exchange import Exchange, Parts
from fvops.device_communicators.shm.messages import Messages
from fvops.device_communicators.shm.mover import Mover, compiled, why_not_compiled
from fvops.device_communicators.shm.mover_plans import MoverOptions
from fvops.device_communicators.shm.op_codes import code
from fvops.device_communicators.shm.pool import Pool
from fvops.device_communicators.shm.reductions import Reductions, shares
from fvops.device_communicators.shm.segment_layout import BARRIERS, COLLECTIVES, MESSAGES
from fvops.device_communicators.shm.watch import PeerError, Watch
from fvops.kernels import layout

__all__ = ["ShmTransport"]

_MASK = (1 << 32) - 1
_ALL_TO_ALL, _ALL_GATHER = code("all_to_all"), code("all_gather")
# Parts of up to so many bytes go through the channels at once: copying them twice costs less than waiting for a post.
_EAGER_BYTES = 64 << 10


class ShmTransport:
    """The transport of one rank of a group whose ranks share a node; `create` makes it. Peers are places in the group.

    After an error in a collective the ranks' counters may differ, so that every later call is refused with that error.
    """

    def __init__(
        self,
        me: int,
        places: int,
        name: str,
        formation: Formation,
        timeout_s: float,
        eager_bytes: int,
        options: MoverOptions,
    ) -> None:
        self.rank = me
        self._eager_bytes = eager_bytes
        self._reduced_together_bytes = 2 * eager_bytes // (places - 1)
        self.world_size = places
        self.name = "shared memory"
        self.device = torch.device("cpu")
        # Starting with the next place, so that not all ranks push to the same one first.
        self._others = [(me + distance) % places for distance in range(1, places)]
        self._watch = watch = Watch(me, formation.segments, formation.peers, timeout_s)
        counters = Counters(places)
        outlets = {j: Outlet(watch, COLLECTIVES, j, counters.sent) for j in self._others}
        inlets = {i: Inlet(watch, COLLECTIVES, i, counters.taken) for i in self._others}
        self._exchange = Exchange(watch, outlets, inlets, counters)
        module = compiled() if options.wanted else None
        self._mover = None if module is None else Mover(module, watch, self._exchange, counters, eager_bytes, options)
        layout = formation.segments[me].layout
        self._reductions = Reductions(me, outlets, inlets, layout.slot_bytes)
        self._messages = Messages(
            watch,
            {j: Outlet(watch, MESSAGES, j) for j in self._others},
            {i: Inlet(watch, MESSAGES, i) for i in self._others},
            name,
        )
        self._own = formation.segments[me]
        self._pool = Pool(self._own, formation.descriptor)
        self._barriers = 0
        self._turn = _Turn(watch)

    @classmethod
    def create(
        cls,
        cpu_group: dist.ProcessGroup,
        name: str,
        *,
        refusal: str = "",
        timeout_s: float | None = None,
        segment_bytes: int | None = None,
        slot_bytes: int | None = None,
        eager_bytes: int = _EAGER_BYTES,
        options: MoverOptions | None = None,
        folder: str = "/dev/shm",
    ) -> tuple[ShmTransport | None, str]:
        """The group's transport, on all ranks or on none, and in words what it is or why there is none. Collective.

        Args:
            cpu_group: gloo group of the ranks.
            name: the group's, for thread names and messages.
            refusal: why this rank does not want it (a setting); one rank is enough for all.
            timeout_s: deadline of each wait, seconds; default ``FVOPS_TIMEOUT_S``.
            segment_bytes: size of each rank's segment; default ``FVOPS_SHM_SEGMENT_MB``.
            slot_bytes: size of a piece, a multiple of 64; default by the number of ranks.
            eager_bytes: parts of up to so many go through the channels at once; the same on every rank.
            options: what goes the way in C; default all that is worth it, unless ``FVOPS_SHM_COMPILED=0``.
            folder: where segments are created; tests use another one as another node.
        """
        timeout_s = envs.FVOPS_TIMEOUT_S if timeout_s is None else timeout_s
        segment_bytes = envs.FVOPS_SHM_SEGMENT_MB << 20 if segment_bytes is None else segment_bytes
        formation, words = form_segments(cpu_group, refusal, segment_bytes, slot_bytes, folder)
        if formation is None:
            return None, words
        me, places = dist.get_rank(cpu_group), dist.get_world_size(cpu_group)
        options = MoverOptions(envs.FVOPS_SHM_COMPILED) if options is None else options
        words += f"; this rank's exchanges are {_how(options)}"
        return cls(me, places, name, formation, timeout_s, eager_bytes, options), words

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialized contiguous tensor for a result: pooled shared memory if it is large and there is room."""
        # The parts of what is smaller go through the channels.
        return self._room(shape, dtype, self._eager_bytes * self.world_size)

    def like(self, input: Tensor) -> Tensor:
        """A result of the input's shape and dtype, for `all_reduce`, `reduce` and `broadcast`."""
        return self._room(input.shape, input.dtype, min(self._eager_bytes, self._reduced_together_bytes))

    def _room(self, shape: Sequence[int], dtype: torch.dtype, least_bytes: int) -> Tensor:
        # A broken group leases nothing: a peer may still write.
        if not self._watch.failure and math.prod(shape) * dtype.itemsize > least_bytes:
            tensor = self._pool.empty(shape, dtype)
            if tensor is not None:
                return tensor
        return torch.empty(tuple(shape), dtype=dtype)

    def exchange(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        """All to all: ``inputs[t][j]`` goes to place j, ``outputs[t][j]`` comes from it, for each tensor t.

        Args:
            outputs: rank-major views ``[P, ...]`` of tensors from `empty`, the same strides on every rank.
            inputs: rank-major views of the same shapes, any strides.
        """
        with self._turn:
            if self._mover is None or not self._mover.parts(_ALL_TO_ALL, outputs, inputs):
                self._move(_ALL_TO_ALL, outputs, inputs)

    def exchange_4D(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], scatter_dim: int) -> None:
        """`exchange` for ``all_to_all_4D``; tensors ``[B, S, H, D]``, of which `scatter_dim` is cut."""
        with self._turn:
            if self._mover is None or not self._mover.exchange_4D(_ALL_TO_ALL, outputs, inputs, scatter_dim):
                parts = layout.exchange_by_rank(outputs, inputs, scatter_dim, self.world_size)
                self._move(_ALL_TO_ALL, *parts)

    def all_gather_along(self, output: Tensor, input: Tensor, dim: int) -> None:
        """`output`, from `empty`, becomes the places' `input`, one after another along `dim`."""
        with self._turn:
            if self._mover is None or not self._mover.all_gather(_ALL_GATHER, output, input, dim):
                parts = layout.chunks_by_rank(output, dim, self.world_size)
                self._move(_ALL_GATHER, (parts,), (input.expand(parts.shape),))

    def all_gather(self, outputs: Tensor, input: Tensor) -> None:
        """``outputs[j]`` becomes place j's `input`; `outputs` is a rank-major view of a tensor from `empty`."""
        with self._turn:
            self._move(_ALL_GATHER, (outputs,), (input.expand(outputs.shape),))

    def exchange_rows(
        self, output: Tensor, input: Tensor, output_rows: Sequence[int], input_rows: Sequence[int]
    ) -> None:
        """``input_rows[j]`` rows of `input`, in order, go to place j; ``output_rows[i]`` of `output` come from it.

        Raises:
            PeerError: what one rank sends is not what the other expects.
        """
        with self._turn:
            # Not in the channels even where parts are small: only what is posted shows that sizes differ.
            give, receive = input.split(list(input_rows)), output.split(list(output_rows))
            receive[self.rank].copy_(give[self.rank])
            self._exchange.run(
                code("all_to_all_single"), self._by_place(give), self._by_place(receive), [output.stride()]
            )

    def broadcast(self, output: Tensor, input: Tensor, src: int) -> None:
        """`output` becomes `input` of place `src`; the others' `input` is not read."""
        with self._turn:
            if self.rank == src:
                output.copy_(input)
                give: Parts = dict.fromkeys(self._others, (output,))
                receive: Parts = {}
            else:
                give, receive = {}, {src: (output,)}
            if output.numel() * output.element_size() <= self._eager_bytes:
                self._exchange.through_channels(code("broadcast"), give, receive)
            else:
                self._exchange.run(code("broadcast"), give, receive, [output.stride()])

    def gather(self, outputs: Tensor | None, input: Tensor, dst: int) -> None:
        """On `dst`, ``outputs[j]`` (a rank-major view) becomes place j's `input`; elsewhere `outputs` is None."""
        with self._turn:
            # In the channels: the strides of the parts are known to `dst` alone.
            if outputs is None:
                self._exchange.through_channels(code("gather"), {dst: (input,)}, {})
            else:
                parts = outputs.unbind(0)
                parts[dst].copy_(input)
                self._exchange.through_channels(code("gather"), {}, self._by_place(parts))

    def reduce_scatter(self, output: Tensor, inputs: Tensor, reduce_op: str) -> None:
        """`output` becomes the reduction of the places' ``inputs[r]``, r this rank; `inputs` is a rank-major view."""
        _check_reduction(reduce_op)
        with self._turn:
            op = code("reduce_scatter")
            if self._mover is not None and self._mover.reduce_scatter(op, output, inputs, reduce_op):
                return
            parts = inputs.unbind(0)
            terms = {j: parts[j] for j in self._others}
            self._reductions.run(op, terms, parts[self.rank], output, reduce_op)

    def all_reduce(self, output: Tensor, input: Tensor, reduce_op: str) -> None:
        """`output` becomes the reduction of the places' `input`, the same bits on every rank."""
        _check_reduction(reduce_op)
        with self._turn:
            op = code("all_reduce")
            # Everyone sends all of it to all others and reduces all of it: one wait instead of two. Else each a share.
            together = input.numel() * input.element_size() <= self._reduced_together_bytes
            if self._mover is not None and self._mover.all_reduce(op, output, input, reduce_op, together):
                return
            if together:
                terms = dict.fromkeys(self._others, input)
                self._reductions.run(op, terms, input, output, reduce_op)
            else:
                self._all_reduce_shares(op, output, input, reduce_op)

    def reduce(self, output: Tensor, input: Tensor, reduce_op: str, dst: int) -> None:
        """On `dst`, `output` becomes the reduction of the places' `input`; elsewhere it is not written."""
        _check_reduction(reduce_op)
        with self._turn:
            if self.rank == dst:
                self._reductions.run(code("reduce"), {}, input, output, reduce_op)
            else:
                self._reductions.run(code("reduce"), {dst: input}, input, None, reduce_op)

    def send(self, input: Tensor, dst: int) -> None:
        """Send to place `dst`; does not wait for it."""
        self._turn.check()
        self._messages.send(input, dst)

    def recv(self, output: Tensor, src: int) -> None:
        """Fill `output` (contiguous) with the next message from place `src`."""
        self._turn.check()
        try:
            self._messages.recv(output, src)
        except BaseException as error:  # an interrupt too: the place in the stream of messages is lost
            self._watch.fail(f"recv from place {src}: {error}", src)
            raise

    def barrier(self) -> None:
        """Return once every rank has called this."""
        with self._turn:
            self._barriers = (self._barriers + 1) & _MASK
            self._own.publish(BARRIERS, self._barriers)
            for place in self._others:
                self._watch.reach(self._watch.segments[place], BARRIERS, self._barriers, place)

    def waiting_for(self) -> list[int]:
        """The places that threads of this rank sleep for at this moment."""
        return list(self._watch.waiting.values())

    def give_up(self, reason: str) -> None:
        """Break the group, and tell the ranks that wait for this one."""
        self._watch.fail(reason, self.rank)

    def close(self) -> None:
        """Leave the group: later calls are refused, results stay valid. Not collective; safe to call twice.

        Raises:
            RuntimeError: after everything is released, when a send was not received by the deadline.
        """
        if self._turn.closed:
            return
        try:
            if not self._watch.failure:
                self._messages.drain(self._watch.timeout_s)
        finally:
            self._turn.closed = True
            self._watch.leave()
            self._pool.close()

    def _by_place(self, parts: Sequence[Tensor]) -> dict[int, tuple[Tensor]]:
        return {place: (parts[place],) for place in self._others}

    def _all_reduce_shares(self, op: int, output: Tensor, input: Tensor, reduce_op: str) -> None:
        """Each rank reduces a share, and pushes each piece of it into the others' results as soon as it has it."""
        exchange, sizes = self._exchange, shares(input.numel(), self.world_size)
        mine, results = input.reshape(-1).split(sizes), output.view(-1).split(sizes)
        own = results[self.rank]
        receive = self._by_place(results)
        exchange.post(op, receive)
        offsets: dict[int, int] = {}

        def push(piece: Tensor) -> None:
            if not offsets:
                offsets.update((place, exchange.await_post(op, place, (own,))[0]) for place in self._others)
            for place, offset in offsets.items():
                if offset:
                    self._watch.segments[place].make(offset, piece.shape, None, piece.dtype).copy_(piece)
                    offsets[place] = offset + piece.numel() * piece.element_size()

        terms = {place: mine[place] for place in self._others}
        self._reductions.run(op, terms, mine[self.rank], own, reduce_op, push)
        for place in self._others:
            exchange.raise_flag(place)
        exchange.finish(op, {place: (own,) for place, offset in offsets.items() if not offset}, receive)

    def _move(self, op: int, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        """`exchange`, for views of any number of tensors."""
        most = self._exchange.most_tensors()
        if len(outputs) > most:
            self._move(op, outputs[:most], inputs[:most])
            self._move(op, outputs[most:], inputs[most:])
            return
        receives = [output.unbind(0) for output in outputs if output.numel()]
        gives = [input.unbind(0) for input in inputs if input.numel()]
        give_parts = {j: [give[j] for give in gives] for j in self._others}
        receive_parts = {i: [receive[i] for receive in receives] for i in self._others}
        own = [(receive[self.rank], give[self.rank]) for receive, give in zip(receives, gives, strict=True)]
        if all(target.numel() * target.element_size() <= self._eager_bytes for target, _ in own):
            self._exchange.through_channels(op, give_parts, receive_parts, own)
        else:
            strides = [target.stride() for target, _ in own]
            self._exchange.run(op, give_parts, receive_parts, strides, own)


class _Turn:
    """One collective at a time; refuses a group that is closed or broken, and breaks it on any error inside."""

    def __init__(self, watch: Watch) -> None:
        self.closed = False
        self._watch = watch
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def check(self) -> None:
        if self.closed:
            raise RuntimeError("this group's shared memory is closed: the group was destroyed")
        if self._watch.failure:
            raise PeerError(f"this group is broken since an earlier error: {self._watch.failure}")
        if os.getpid() != self._pid:
            raise RuntimeError(f"this group belongs to process {self._pid}; a forked child cannot use it")

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            self.check()
        except BaseException:  # `__exit__` is not called when this raises
            self._lock.release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            culprit = error.places[0] if isinstance(error, PeerError) and error.places else self._watch.me
            self._watch.fail(f"{type(error).__name__}: {error}", culprit)
        self._lock.release()


def _how(options: MoverOptions) -> str:
    if not options.wanted:
        return "in Python (FVOPS_SHM_COMPILED=0)"
    why_not = why_not_compiled()
    return f"in Python ({why_not})" if why_not else "in C"


def _check_reduction(reduce_op: str) -> None:
    if reduce_op not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduce_op!r}; it must be one of {', '.join(REDUCTIONS)}")
