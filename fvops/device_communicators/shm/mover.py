"""Exchanges and sums in C (`mover.c`), where it was compiled: the same protocol, in one call instead of some dozens.

What no plan covers (see `mover_plans.py`), results outside the pool and lazily conjugated tensors go the way of
`exchange.py` and `reductions.py`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fvops.device_communicators.shm.counters import Counters
from fvops.device_communicators.shm.exchange import Exchange
from fvops.device_communicators.shm.mover_plans import (
    ExchangePlan,
    MoverOptions,
    ReductionPlan,
    plan_exchange,
    plan_reduction,
)
from fvops.device_communicators.shm.reductions import shares
from fvops.device_communicators.shm.segment_layout import COLLECTIVES, OP, SLOTS, STEP
from fvops.device_communicators.shm.watch import PeerError, Watch
from fvops.kernels import layout

__all__ = ["Mover", "compiled", "why_not_compiled"]

_MODULE = "fvops.device_communicators.shm._mover"
# INTERFACE of mover.h, and the bytes of Part, Reduction and Layout there.
_ABI = 1 << 20 | 8 * ((3 + 3 * 13) + (4 + 2 * 64) + 12)
# What `begin` and `advance` return in the lowest 8 bits; above are 8 of the place, and the tensor. As in mover.c.
_DONE, _NEEDS_POST, _NEEDS_FLAG, _NEEDS_SLOT, _NEEDS_PIECE, _WRONG_POST, _WRONG_PIECE, _HOMELESS = range(8)
_MOST_PLANS = 256
# How often C looks for a peer before Python sleeps for it, learnt as in watch.py. A look with its pause takes about
# 40 ns, a sleep and being woken 50 us and more.
_FEWEST_LOOKS, _MOST_LOOKS = 20, 8000

# The rank-major views of what an exchange fills and of what it reads.
Views = Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]]


def _parts_of(answer: int) -> tuple[int, int, int]:
    """What is needed, of which place, and at which tensor or piece."""
    return answer & 255, answer >> 8 & 255, answer >> 16


def _unexplained(place: int) -> PeerError:
    return PeerError(f"place {place} posted, or announced, what cannot be: its words are damaged", [place])


@functools.cache
def compiled() -> Any:
    """The extension module; None where there is none that fits, see `why_not_compiled`."""
    return None if why_not_compiled() else importlib.import_module(_MODULE)


@functools.cache
def why_not_compiled() -> str:
    """Why exchanges are not in C here; empty where they can be."""
    try:
        module = importlib.import_module(_MODULE)
    except ImportError:
        return "installed without the extension in C"
    # An installation in place that was not repeated after an update of the sources.
    if getattr(module, "abi", lambda: 0)() != _ABI:
        return "the extension in C was compiled from other sources; install fvops again"
    return ""


class Mover:
    """The exchanges and reductions of one group at one rank.

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
        looks = (_FEWEST_LOOKS, _FEWEST_LOOKS if watch.crowded else _MOST_LOOKS // (self._P - 1))
        self._handle = module.create(watch.me, counters.address, numbers, segments, *looks)
        self._plans: dict[Any, ExchangePlan | ReductionPlan | None] = {}

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

    def reduce_scatter(self, op: int, output: Tensor, inputs: Tensor, reduce_op: str) -> bool:
        """`ShmTransport.reduce_scatter`."""

        def plan() -> ReductionPlan | None:
            part, step = inputs[0], inputs.stride(0) * inputs.element_size()
            terms = [(place * step, part.numel() * part.element_size()) for place in range(self._P)]
            return plan_reduction(part, reduce_op, terms, self._watch.me, self._slot_bytes, spread=False)

        key = (reduce_op, inputs.shape, inputs.stride(), inputs.dtype)
        return self._reduce(op, output, inputs, self._kept(key, plan))

    def all_reduce(self, op: int, output: Tensor, input: Tensor, reduce_op: str, together: bool) -> bool:
        """`ShmTransport.all_reduce`; not `together`: each place reduces its share, and hands it to the others."""

        def plan() -> ReductionPlan | None:
            nbytes, item = input.numel() * input.element_size(), input.element_size()
            me, slot = self._watch.me, self._slot_bytes
            if together:
                return plan_reduction(input, reduce_op, [(0, nbytes)] * self._P, me, slot, spread=False)
            if not input.is_contiguous():
                return None
            sizes = [size * item for size in shares(input.numel(), self._P)]
            terms = [(sum(sizes[:place]), size) for place, size in enumerate(sizes)]
            return plan_reduction(input.view(-1), reduce_op, terms, me, slot, spread=True)

        if together and not input.is_contiguous():
            # Small; so that all ranks reduce in C whatever their strides, and a NaN has the same bits on all.
            input = input.contiguous()
        if not together and not self._is_pooled(output):
            return False
        key = (reduce_op, together, input.shape, input.stride(), input.dtype)
        return self._reduce(op, output, input, self._kept(key, plan))

    def _reduce(self, op: int, output: Tensor, input: Tensor, plan: ReductionPlan | None) -> bool:
        address = input.data_ptr()
        if plan is None or input.is_neg() or address == 0 or address % input.element_size():
            return False
        answer = self._module.reduce(self._handle, plan.address, op, address, output.data_ptr())
        while answer:
            need, place, number = _parts_of(answer)
            if need == _WRONG_PIECE:
                self._exchange.inlets[place].check(op, plan.piece_bytes(number - 1))
                raise _unexplained(place)
            elif need in (_WRONG_POST, _HOMELESS):
                first, size = (number // output.element_size() for number in plan.own)
                own = (output.view(-1)[first : first + size],)
                if need == _HOMELESS:
                    places = [j for j, bits in enumerate(self._module.homeless(self._handle)) if bits]
                    self._exchange.through_channels(op, dict.fromkeys(places, own), {})
                else:
                    self._exchange.await_post(op, place, own)
                    raise _unexplained(place)
            else:
                self._await(need, place)
            answer = self._module.advance(self._handle)
        return True

    def _is_pooled(self, output: Tensor) -> bool:
        return 0 <= output.data_ptr() - self._address < self._size

    def _kept(self, key: Any, make: Callable[[], Any]) -> Any:
        try:
            return self._plans[key]
        except KeyError:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[key] = plan = make()
            return plan

    def _run(self, op: int, key: Any, outputs: Sequence[Tensor], inputs: Sequence[Tensor], views: Views) -> bool:
        """The exchange of `views`, which begin where `outputs` and `inputs` do; `key` is what its plan depends on."""
        plan: ExchangePlan | None = self._kept(key, lambda: self._plan(*views()))
        if plan is None:
            return False
        addresses: list[int] = []
        for x, y in zip(inputs, outputs, strict=True):
            if x.is_neg() or x.is_conj():
                return False
            if not plan.eager and not self._is_pooled(y):
                return False
            address = x.data_ptr()
            if address == 0:  # a zero tensor of autograd's, without memory
                return False
            addresses += (address, y.data_ptr())
        answer = self._module.begin(self._handle, plan.address, op, *addresses)
        while answer:
            self._serve(answer, op, plan, views)
            answer = self._module.advance(self._handle)
        return True

    def _serve(self, answer: int, op: int, plan: ExchangePlan, views: Views) -> None:
        """What the exchange cannot go on without: a word of a peer, or parts that have to go through the channels."""
        need, place, tensor = _parts_of(answer)
        if need == _HOMELESS:
            wanted = enumerate(self._module.homeless(self._handle))
            _, inputs = views()
            give = {j: [x[j] for t, x in enumerate(inputs) if bits >> t & 1] for j, bits in wanted if bits}
            self._exchange.through_channels(op, give, {})
        elif need == _WRONG_PIECE:
            self._exchange.inlets[place].check(op, plan.sizes[tensor])
            raise _unexplained(place)
        elif need == _WRONG_POST:
            self._exchange.await_post(op, place, [x[place] for x in views()[1]])
            raise _unexplained(place)
        else:
            self._await(need, place)

    def _await(self, need: int, place: int) -> None:
        watch, counters = self._watch, self._counters
        if need == _NEEDS_POST:
            watch.reach(watch.segments[place], STEP, counters.step[0], place)
        elif need == _NEEDS_FLAG:
            watch.reach(self._own, self._own.layout.flag(place), counters.seen[place], place)
        elif need == _NEEDS_SLOT:
            self._exchange.outlets[place].await_slot()
        else:
            self._exchange.inlets[place].await_piece()

    def _plan(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> ExchangePlan | None:
        if len(inputs) > self._exchange.most_tensors():
            return None
        can_stream = self._module.streams()
        return plan_exchange(outputs, inputs, self._eager_bytes, self._slot_bytes, self._options, can_stream)
