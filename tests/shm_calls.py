"""Calls on a shared-memory transport as data: what each rank does, and what the reference says it should get.

Transports are made once per configuration and worker, and stay: configurations differ in what they force through which
part of the protocol.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fvops.device_communicators.shm.mover_plans import MoverOptions
from tests import reference
from tests.draws import bits, make, storage_bits

__all__ = ["CONFIGURATIONS", "REDUCING", "Call", "agree", "expected", "fresh_transport", "perform", "run_calls"]

REDUCING = ("all_reduce", "reduce", "reduce_scatter")
# In C whatever the rows, or not at all; as shipped it is rows of 32 bytes and more, which few of these calls have.
_IN_C = {"options": MoverOptions(shortest_row=1, streamed_bytes=0)}
_IN_PYTHON = {"options": MoverOptions(wanted=False)}
# plain: as shipped. direct: nothing is too small to be pushed. pieces: tiny slots, and pools that are soon exhausted.
# uneven: odd places have no pool memory at all. wrapping: every counter is about to pass 2**32. mixed: odd places have
# no extension.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {"segment_bytes": 16 << 20},
    "plain, in Python": {"segment_bytes": 16 << 20, **_IN_PYTHON},
    "direct": {"segment_bytes": 16 << 20, "eager_bytes": 0, **_IN_C},
    "direct, in Python": {"segment_bytes": 16 << 20, "eager_bytes": 0, **_IN_PYTHON},
    "pieces": {"segment_bytes": 64 << 10, "slot_bytes": 128, "eager_bytes": 0},
    "uneven": {"segment_bytes": 64 << 10, "slot_bytes": 192, "eager_bytes": 0, **_IN_C},
    "wrapping": {"segment_bytes": 1 << 20, "slot_bytes": 128, "eager_bytes": 64, **_IN_C},
    "mixed": {"segment_bytes": 1 << 20, "slot_bytes": 192, "eager_bytes": 64, **_IN_C},
}
_transports: dict[tuple[str, str], Any] = {}
_hogs: list[Tensor] = []


@dataclass(frozen=True)
class Call:
    """One collective; rank r's input is ``make(shape, dtype, layouts[r], seed + 100 * r)``."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layouts: Sequence[str]
    seed: int
    args: dict[str, Any] = field(default_factory=dict)

    def input(self, rank: int) -> Tensor:
        """Rank `rank`'s tensor."""
        shape = self.shape
        if self.op == "all_to_all_single":
            shape = (sum(self.args["rows"][rank]), *shape[1:])
        kind = self.layouts[rank % len(self.layouts)]
        return make(shape, self.dtype, kind, self.seed + 100 * rank, numbers=self.op in REDUCING)


def expected(call: Call, P: int) -> Sequence[Tensor | None]:
    """The reference's results, by rank."""
    inputs = [call.input(rank).contiguous() for rank in range(P)]
    args = call.args
    if call.op == "ring":
        return [inputs[(rank - 1) % P] for rank in range(P)]
    if call.op == "reduce":
        reduced = reference.all_reduce(inputs, args["op"])[0]
        return [reduced if rank == args["dst"] else None for rank in range(P)]
    results: Sequence[Tensor | None] = getattr(reference, call.op)(inputs, **args)
    return results


def agree(call: Call, results: Sequence[Tensor | None], P: int) -> None:
    """Fail unless every rank's result is the reference's: bit for bit, but for the sign of zero in reductions."""
    for rank, (result, wanted) in enumerate(zip(results, expected(call, P), strict=True)):
        assert (result is None) == (wanted is None), (call, rank)
        if result is None or wanted is None:
            continue
        assert result.shape == wanted.shape, (call, rank, result.shape, wanted.shape)
        if call.op in REDUCING:
            wide = torch.float64 if call.dtype.is_floating_point else torch.int64
            result, wanted = result.to(wide), wanted.to(wide)
            # The mean of three is rounded to float32 before it is rounded to a narrower type.
            slack = torch.finfo(call.dtype).eps if call.args["op"] == "avg" else 0.0
            assert bool(((result - wanted).abs() <= slack * wanted.abs()).all()), (call, rank, result, wanted)
        else:
            assert torch.equal(bits(result), bits(wanted)), (call, rank, result, wanted)


@contextmanager
def fresh_transport(**options: Any) -> Iterator[Any]:
    """A transport over the sequence-parallel group, closed afterwards."""
    import fvops
    from fvops.device_communicators.shm import ShmTransport

    transport, words = ShmTransport.create(fvops.get_sp_group().cpu_group, "test", **{"timeout_s": 30.0} | options)
    assert transport is not None, words
    try:
        yield transport
    finally:
        transport.close()


def _standing_transport(name: str) -> Any:
    import fvops
    from fvops.device_communicators.shm import ShmTransport

    group = fvops.get_sp_group()
    # A new world has new sockets and places; transports of an earlier one are of no use in it.
    key = (name, f"{id(group)}")
    if key not in _transports:
        options = CONFIGURATIONS[name] | (_IN_PYTHON if name == "mixed" and group.rank_in_group % 2 else {})
        transport, words = ShmTransport.create(group.cpu_group, name, timeout_s=30.0, **options)
        assert transport is not None, words
        if name == "uneven" and transport.rank % 2:
            while (hog := transport._pool.empty((64,), torch.uint8)) is not None:
                _hogs.append(hog)
        if name == "wrapping":
            _advance(transport, group)
        _transports[key] = transport
    return _transports[key]


def _advance(transport: Any, group: Any) -> None:
    """Set all counters, which are in step while nothing is under way, to shortly before they wrap."""
    from fvops.device_communicators.shm.segment_layout import BARRIERS, COLLECTIVES, MESSAGES, STEP

    start = 2**32 - 3
    own, exchange = transport._own, transport._exchange
    indices = [STEP, BARRIERS]
    for place in transport._others:
        channels = [own.layout.channel(kind, place) for kind in (COLLECTIVES, MESSAGES)]
        indices += [own.layout.flag(place), *(index for c in channels for index in (c.pushed, c.drained))]
        exchange._counters.raised[place] = exchange._counters.seen[place] = start
        ends = [exchange.outlets[place], exchange.inlets[place], transport._messages._inlets[place]]
        for end in [*ends, transport._messages._backlogs[place]._outlet]:
            end._count = start
    for index in indices:
        own.words[index] = start
    exchange._counters.step[0] = transport._barriers = start
    group.barrier()


def run_calls(name: str, calls: Sequence[Call]) -> list[tuple[Tensor | None, list[str]]]:
    """On one rank: perform `calls` one after another, all results alive to the end; results and complaints."""
    transport = _standing_transport(name)
    told = []
    for call in calls:
        x = call.input(transport.rank)
        before = storage_bits(x)
        result = perform(transport, call, x)
        complaints = [] if torch.equal(storage_bits(x), before) else ["the input was written"]
        if result is not None and (result._is_view() or not result.is_contiguous()):
            complaints.append("the result is a view, or not contiguous")
        told.append((result, complaints, None if result is None else result.clone()))
    for number, (result, complaints, then) in enumerate(told):
        if then is not None and not torch.equal(bits(then), bits(result)):
            complaints.append(f"result {number} was changed by a later call")
    return [(then, complaints) for _, complaints, then in told]


def perform(transport: Any, call: Call, x: Tensor) -> Tensor | None:
    """One call as a communicator makes it: allocate, view rank-major, hand to the transport."""
    from fvops.kernels import layout

    P, rank, args = transport.world_size, transport.rank, call.args
    if call.op == "all_to_all_4D":
        shape = list(x.shape)
        shape[args["scatter_dim"]] //= P
        shape[args["gather_dim"]] *= P
        y = transport.empty(shape, x.dtype)
        transport.exchange_4D([y], [x], args["scatter_dim"])
    elif call.op == "all_to_all_single":
        rows = args["rows"]
        received = [rows[j][rank] for j in range(P)]
        y = transport.empty((sum(received), *x.shape[1:]), x.dtype)
        transport.exchange_rows(y, x, received, rows[rank])
    elif call.op in ("all_gather", "gather"):
        dim = args["dim"]
        shape = list(x.shape)
        shape[dim] *= P
        y = transport.empty(shape, x.dtype)
        if call.op == "all_gather":
            transport.all_gather_along(y, x, dim)
        elif rank == args["dst"]:
            transport.gather(layout.chunks_by_rank(y, dim, P), x, args["dst"])
        else:
            transport.gather(None, x, args["dst"])
            return None
    elif call.op == "reduce_scatter":
        parts = layout.chunks_by_rank(x, args["dim"], P)
        y = transport.empty(parts.shape[1:], x.dtype)
        transport.reduce_scatter(y, parts, args["op"])
    else:
        y = transport.like(x)
        if call.op == "all_reduce":
            transport.all_reduce(y, x, args["op"])
        elif call.op == "reduce":
            transport.reduce(y, x, args["op"], args["dst"])
            return y if rank == args["dst"] else None
        elif call.op == "broadcast":
            transport.broadcast(y, x, args["src"])
        else:
            transport.send(x, (rank + 1) % P)
            transport.recv(y, (rank - 1) % P)
            transport.barrier()
    return y
