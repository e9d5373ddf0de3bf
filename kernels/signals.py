"""How ranks tell each other, on the device, that an exchange's data is there: a count for each pair of ranks.

Nothing is ever reset by another rank or by the host, so a CUDA graph that holds these steps can be replayed: which
exchange it is, each rank reads from its own EPOCH word. The memory-ordering argument is in docs/one-sided.md.

    every program    stores its data;  barrier of its threads;  TICKET += 1 (acquire-release, this device)
    the last one     for every peer:   peer's FLAG[place] <- epoch + 1 (release, system)
                     for every source: until FLAG[source] >= epoch + 1 (acquire, system) or ABORT
                     TICKET <- 0;  EPOCH <- epoch + 1

Only one program of a launch waits, and the others have left by then: a wait holds one multiprocessor's corner, not the
device, and cannot keep a peer that shares the device from running.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fvops.kernels import push_plan

__all__ = ["aborted", "epoch", "meet"]

_EPOCH = tl.constexpr(push_plan.EPOCH)
_TICKET = tl.constexpr(push_plan.TICKET)
_WAITING = tl.constexpr(push_plan.WAITING)
_ABORT = tl.constexpr(push_plan.ABORT)
_FLAGS = tl.constexpr(push_plan.FLAGS)
_LINE = tl.constexpr(push_plan.LINE_WORDS)


@triton.jit
def epoch(words: tl.tensor) -> tl.tensor:
    """How many exchanges this rank has completed."""
    return tl.load(words + _EPOCH)


@triton.jit
def aborted(words: tl.tensor) -> tl.tensor:
    """Has this rank's host given up? Sticky: all later exchanges of these words are void."""
    return tl.load(words + _ABORT) != 0


@triton.jit
def _read(word: tl.tensor) -> tl.tensor:
    """What another device or the host has written: an acquiring load, by one thread, that all threads are told of.

    Threads that read for themselves could see different values, and part at a barrier.
    """
    return tl.atomic_add(word, 0, sem="acquire", scope="sys")


@triton.jit
def meet(words: tl.tensor, addresses: tl.tensor, place: tl.tensor, WORLD: tl.constexpr) -> None:
    """Called by every program of a launch after its last store: returns, in the last one, when all data has come."""
    now = epoch(words)
    tl.debug_barrier()
    finished = tl.atomic_add(words + _TICKET, 1, sem="acq_rel", scope="gpu")
    if finished == tl.num_programs(0) - 1:
        target = now + 1
        tl.store(words + _WAITING, target)
        if not aborted(words):
            for peer in range(WORLD):
                theirs = tl.load(addresses + peer).to(tl.pointer_type(tl.int64))
                tl.atomic_xchg(theirs + _FLAGS + place * _LINE, target, sem="release", scope="sys")
        for source in range(WORLD):
            seen = _read(words + _FLAGS + source * _LINE)
            while (seen < target) & (_read(words + _ABORT) == 0):
                seen = _read(words + _FLAGS + source * _LINE)
        tl.store(words + _WAITING, 0)
        tl.store(words + _TICKET, 0)
        tl.store(words + _EPOCH, target)
