"""The exchange in C (`mover.c`), where it was compiled: the same protocol, in one call instead of some dozens.

A *plan* says how each tensor of an exchange is copied; it depends on shapes and strides alone and is kept. What no plan
covers (rows of a few bytes, results outside the pool, lazily conjugated tensors) goes the way of `exchange.py`.
"""

from __future__ import annotations

import functools
import importlib
import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fvops.device_communicators.shm.counters import Counters
from fvops.device_communicators.shm.exchange import Exchange
from fvops.device_communicators.shm.segment_layout import COLLECTIVES, OP, SLOTS, STEP
from fvops.device_communicators.shm.watch import Watch
from fvops.kernels import layout
from fvops.kernels.parts_plan import Pair, merged_axes

__all__ = ["Mover", "MoverOptions", "compiled"]

# What `begin` and `advance` return in the lowest 8 bits; above are 8 of the place, and the tensor. As in mover.c.
_DONE, _NEEDS_POST, _NEEDS_FLAG, _NEEDS_SLOT, _NEEDS_PIECE, _MISMATCH, _HOMELESS = range(7)
_MOST_TENSORS, _MOST_AXES = 64, 4
_MOST_PLANS = 256
# How often C looks for a peer before Python sleeps for it, learnt as in watch.py. A look with its pause takes about
# 40 ns, a sleep and being woken 50 us and more.
_FEWEST_LOOKS, _MOST_LOOKS = 20, 8000

# The rank-major views of what an exchange fills and of what it reads.
Views = Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]]


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


@functools.cache
def compiled() -> Any:
    """The extension module; None where it was not compiled (no compiler at installation, or not Linux)."""
    try:
        return importlib.import_module("fvops.device_communicators.shm._mover")
    except ImportError:
        return None


class _Plan:
    """How one exchange's tensors are copied: `values` are what mover.c reads, `sizes` the bytes of each one's parts."""

    def __init__(self, values: array[int], sizes: list[int], eager: bool) -> None:
        self.values = values
        self.address = values.buffer_info()[0]
        self.sizes = sizes
        self.eager = eager


class Mover:
    """The exchanges of one group at one rank.

    Args:
        eager_bytes: parts of up to so many bytes go through the channels.
    """

    def __init__(
        self,
        module: Any,
        watch: Watch,
        exchange: Exchange,
        counters: Counters,
        eager_bytes: int,
        options: MoverOptions,
    ) -> None:
        self._module = module
        self._watch = watch
        self._exchange = exchange
        self._counters = counters  # the handle refers to its memory
        self._eager_bytes = eager_bytes
        self._options = options
        self._P = len(watch.segments)
        self._own = own = watch.segments[watch.me]
        self._address, self._size = own.address, own.size
        places = own.layout
        first, of_channel = places.flag(0), places.channel(COLLECTIVES, 0)
        self._slot_bytes = of_channel.slot_bytes
        numbers = (
            first,
            places.flag(1) - first,
            of_channel.pushed - first,
            of_channel.drained - first,
            of_channel.headers - first,
            of_channel.slots,
            of_channel.slot_bytes,
            SLOTS,
            places.table,
            STEP,
            OP,
            places.segment_bytes,
        )
        segments = tuple(segment.address for segment in watch.segments)
        crowded = len(segments) > len(os.sched_getaffinity(0))
        looks = (_FEWEST_LOOKS, _FEWEST_LOOKS if crowded else _MOST_LOOKS)
        self._handle = module.create(watch.me, counters.address, numbers, segments, *looks)
        self._plans: dict[Any, _Plan | None] = {}

    # These return False, having done nothing, where an exchange is not for C. They raise PeerError as `Watch.reach`, or
    # when a peer is in another collective or expects other sizes.

    def exchange_4D(self, op: int, outputs: Sequence[Tensor], inputs: Sequence[Tensor], scatter_dim: int) -> bool:
        """`ShmTransport.exchange_4D`."""
        # The outputs are contiguous, and their shapes follow.
        key = (scatter_dim, *[(x.shape, x.stride(), x.dtype) for x in inputs])

        def views() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
            return layout.exchange_by_rank(outputs, inputs, scatter_dim, self._P)

        return self._run(op, key, outputs, inputs, views)

    def all_gather(self, op: int, output: Tensor, input: Tensor, dim: int) -> bool:
        """`ShmTransport.all_gather_along`."""

        def views() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
            parts = layout.chunks_by_rank(output, dim, self._P)
            return [parts], [input.expand(parts.shape)]

        return self._run(op, ("all_gather", dim, input.shape, input.stride(), input.dtype), (output,), (input,), views)

    def parts(self, op: int, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
        """`ShmTransport.exchange`."""
        key = tuple([(x.shape, x.stride(), y.stride(), x.dtype) for x, y in zip(inputs, outputs, strict=True)])
        return self._run(op, key, outputs, inputs, lambda: (outputs, inputs))

    def _run(self, op: int, key: Any, outputs: Sequence[Tensor], inputs: Sequence[Tensor], views: Views) -> bool:
        """The exchange of `views`, which begin where `outputs` and `inputs` do; `key` is what its plan depends on."""
        try:
            plan = self._plans[key]
        except KeyError:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            plan = self._plans[key] = self._plan(*views())
        if plan is None:
            return False
        addresses: list[int] = []
        for x, y in zip(inputs, outputs, strict=True):
            if x.is_neg() or x.is_conj():
                return False
            target = y.data_ptr()
            if not plan.eager and not 0 <= target - self._address < self._size:
                return False
            addresses += (x.data_ptr(), target)
        answer = self._module.begin(self._handle, plan.address, op, *addresses)
        while answer:
            self._serve(answer, op, plan, views)
            answer = self._module.advance(self._handle)
        return True

    def _serve(self, answer: int, op: int, plan: _Plan, views: Views) -> None:
        """What the exchange cannot go on without: a word of a peer, or parts that have to go through the channels."""
        need, place, tensor = answer & 255, answer >> 8 & 255, answer >> 16
        watch, counters, exchange = self._watch, self._counters, self._exchange
        if need == _NEEDS_POST:
            watch.reach(watch.segments[place], STEP, counters.step[0], place)
        elif need == _NEEDS_FLAG:
            watch.reach(self._own, self._own.layout.flag(place), counters.seen[place], place)
        elif need == _NEEDS_SLOT:
            exchange.outlets[place].await_slot()
        elif need == _NEEDS_PIECE:
            exchange.inlets[place].await_piece()
        elif need == _HOMELESS:
            wanted = enumerate(self._module.homeless(self._handle))
            _, inputs = views()
            give = {j: [x[j] for t, x in enumerate(inputs) if bits >> t & 1] for j, bits in wanted if bits}
            exchange.through_channels(op, give, {})
        elif plan.eager:
            exchange.inlets[place].check(op, plan.sizes[tensor])
        else:
            exchange.await_post(op, place, [x[place] for x in views()[1]])

    def _plan(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> _Plan | None:
        if len(inputs) > min(_MOST_TENSORS, self._exchange.most_tensors()):
            return None
        sizes = [x[0].numel() * x.element_size() for x in inputs]
        eager = max(sizes) <= self._eager_bytes
        if min(sizes) == 0 or (eager and max(sizes) > self._slot_bytes):
            return None
        streamed = not eager and sum(sizes) * len(inputs[0]) >= self._options.streamed_bytes and self._module.streams()
        values = array("q", [len(inputs), eager, streamed])
        for x, y, nbytes in zip(inputs, outputs, sizes, strict=True):
            item = x.element_size()
            values.extend([nbytes, x.stride(0) * item, y.stride(0) * item])
            shape, given, wanted = tuple(x.shape[1:]), x.stride()[1:], y.stride()[1:]
            packed = torch.empty(shape, device="meta").stride()
            for source, target in ((given, wanted), (given, packed), (packed, wanted)):
                row, *axes = merged_axes(Pair(item, shape, source, target, 1))
                if len(axes) > _MOST_AXES or row.size < self._options.shortest_row:
                    return None
                unused = [(1, 0, 0)] * (_MOST_AXES - len(axes))
                values.append(row.size)
                for numbers in zip(*axes, *unused, strict=True):  # sizes, then both sides' strides
                    values.extend(numbers)
        return _Plan(values, sizes, eager)
