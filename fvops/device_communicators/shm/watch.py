"""Waiting for other ranks: a short spin, then sleep on the word, with an eye on the peers and on the clock.

A wait ends in one of five ways: the word comes; the peer has died; it has left the group; it has given up itself (its
error is passed on, so that a failure reaches ranks that wait for one another in a chain); the deadline passes. Whoever
fails marks its segment and wakes all who may be waiting for it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence

from fvops.device_communicators.shm import futex
from fvops.device_communicators.shm.peers import Peer
from fvops.device_communicators.shm.segment import Segment
from fvops.device_communicators.shm.segment_layout import (
    BARRIERS,
    CLOSED,
    COLLECTIVES,
    CULPRIT,
    FAILED,
    MESSAGES,
    STATE,
    STEP,
)

__all__ = ["PeerError", "Watch"]

# How long a sleep lasts before the peer is looked at.
_SLICE_S = 0.25
# How often a wait looks at the word before it sleeps, a look costing about 0.1 us. It pays only where the peer is about
# to come and has a core of its own to come on, which is learnt: a spin that saw the word come allows a longer one, a
# spin in vain halves the next.
_FEWEST_LOOKS, _MOST_LOOKS = 10, 300
_SIGN = 1 << 31


class PeerError(RuntimeError):
    """A rank did not do its part. `places` are the ranks at fault, as far as this rank can tell."""

    def __init__(self, text: str, places: Sequence[int] = ()) -> None:
        super().__init__(text)
        self.places = tuple(places)


class Watch:
    """The waits of one rank of a group.

    Args:
        me: this rank's place.
        segments: all places' segments.
        peers: the other places' processes.
        timeout_s: deadline of each wait, seconds.

    Attributes:
        failure: why this rank has given up; empty while all is well.
        crowded: are there more ranks than cores for them?
        waiting: the places that threads of this rank sleep for at this moment, by thread.
    """

    def __init__(self, me: int, segments: Sequence[Segment], peers: Mapping[int, Peer], timeout_s: float) -> None:
        self.me = me
        self.segments = segments
        self.timeout_s = timeout_s
        self.failure = ""
        self.waiting: dict[int, int] = {}
        self._peers = peers
        self.crowded = len(segments) > len(os.sched_getaffinity(0))
        self._looks = _FEWEST_LOOKS if self.crowded else _MOST_LOOKS

    def reach(self, segment: Segment, index: int, target: int, place: int) -> None:
        """Wait until the counter at `index` of `segment`, which `place` advances, is at least `target` (modulo 2**32).

        Raises:
            PeerError: `place` died, left or gave up, or the deadline passed.
        """
        words = segment.words
        if (words[index] - target) & _SIGN:
            for _ in range(self._looks):
                if not (words[index] - target) & _SIGN:
                    self._looks = min(_MOST_LOOKS, 2 * self._looks)
                    break
            else:
                self._looks = max(_FEWEST_LOOKS, self._looks // 2)
                thread = threading.get_ident()
                self.waiting[thread] = place
                try:
                    self._sleep(segment, index, target, place)
                finally:
                    del self.waiting[thread]
        if futex.WEAKLY_ORDERED:
            futex.wake(segment.address + 4 * index)

    def fail(self, reason: str, culprit: int) -> None:
        """Give up: tell the ranks that wait for this one, and remember why. Later calls change nothing."""
        if self.failure:
            return
        self.failure = reason
        self.segments[self.me].words[CULPRIT] = culprit
        self._mark(FAILED)

    def leave(self) -> None:
        """Say that this rank takes part no more, and let go of its peers' processes."""
        if not self.failure:
            self._mark(CLOSED)
        for peer in self._peers.values():
            peer.close()

    def _mark(self, state: int) -> None:
        own = self.segments[self.me]
        own.publish(STATE, state)
        for index in (STEP, BARRIERS):
            futex.wake(own.address + 4 * index)
        for place, segment in enumerate(self.segments):
            if place != self.me:
                layout = segment.layout
                for kind in (COLLECTIVES, MESSAGES):
                    futex.wake(segment.address + 4 * layout.channel(kind, self.me).pushed)
                    futex.wake(own.address + 4 * layout.channel(kind, place).drained)
                futex.wake(segment.address + 4 * layout.flag(self.me))

    def _sleep(self, segment: Segment, index: int, target: int, place: int) -> None:
        words, address = segment.words, segment.address + 4 * index
        until = time.monotonic() + self.timeout_s
        while True:
            seen = words[index]
            if not (seen - target) & _SIGN:
                return
            remaining = until - time.monotonic()
            if remaining > 0:
                futex.wait(address, seen, min(_SLICE_S, remaining))
            if not (words[index] - target) & _SIGN:
                return
            error = self._complaint(place, remaining <= 0)
            # The peer may have raised the word as its last deed.
            if error is not None and (words[index] - target) & _SIGN:
                raise error

    def _complaint(self, place: int, late: bool) -> PeerError | None:
        words, peer = self.segments[place].words, self._peers[place]
        if self.failure:
            return PeerError(self.failure, [place])
        if words[STATE] == FAILED:
            culprit = words[CULPRIT]
            if culprit in (place, self.me):
                return PeerError(f"place {place} (pid {peer.pid}) gave up with an error of its own", [place])
            return PeerError(f"place {place} (pid {peer.pid}) gave up waiting for place {culprit}", [culprit])
        if words[STATE] == CLOSED:
            return PeerError(f"place {place} (pid {peer.pid}) has left the group", [place])
        if not peer.alive():
            return PeerError(f"place {place} (pid {peer.pid}) has died", [place])
        if late:
            text = f"place {place} (pid {peer.pid}) did not come within {self.timeout_s:g} s; its process "
            return PeerError(text + peer.condition(), [place])
        return None
