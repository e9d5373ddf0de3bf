"""Deadlines for waits on the device: the host reads the words beside the running kernels, and ends what is late.

A kernel cannot raise. What it waits for stands in its WAITING word, so a thread sees it for exchanges that Python
issued and for those in a replayed graph alike. A wait that is late is reported, with the ranks that are missing, and
given up: the ABORT word lets the kernel end, with a void result, and every later call on the host raises.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fvops.device_communicators.shm.watch import PeerError
from fvops.device_communicators.symmetric_buffer import SymmetricBuffer
from fvops.kernels.push_plan import FLAGS, LINE_WORDS, WAITING
from fvops.logger import init_logger

__all__ = ["SymmetricWatchdog"]

logger = init_logger(__name__)

# The thread looks this often, in seconds: often enough to be at most a tenth of the deadline late.
_LONGEST_INTERVAL_S = 1.0


class SymmetricWatchdog:
    """Watches the buffers of one group at one rank, from the first `follow` until `stop`.

    Args:
        group_name: for messages.
        deadline_s: how long a wait on the device may take, seconds.
        prepare: called in the thread before it asks the device for anything; False when it may not.

    Attributes:
        last_call: what Python issued last, for the report; set by the transport.
        missing: the places that the device waited for when it was looked at last.
    """

    def __init__(self, group_name: str, deadline_s: float, prepare: Callable[[], bool]) -> None:
        self.last_call = ""
        self.missing: list[int] = []
        self._group_name = group_name
        self._deadline_s = deadline_s
        self._prepare = prepare
        self._failure: PeerError | None = None
        # For each buffer the count that it was seen to wait for, and since when on the monotonic clock.
        self._waits: dict[SymmetricBuffer, tuple[int, float]] = {}
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def follow(self, buffer: SymmetricBuffer) -> None:
        """Watch this buffer too."""
        with self._lock:
            self._waits[buffer] = (0, 0.0)
        if self._thread is None:
            name = f"fvops symmetric watchdog of {self._group_name}"
            self._thread = threading.Thread(target=self._watch, name=name, daemon=True)
            self._thread.start()

    def forget(self, buffer: SymmetricBuffer) -> None:
        """Watch it no longer."""
        with self._lock:
            self._waits.pop(buffer, None)

    def raise_if_broken(self) -> None:
        """PeerError, which names the missing places, once a wait was given up."""
        if self._failure is not None:
            raise PeerError(str(self._failure), self._failure.places)

    def stop(self) -> None:
        """End the thread, waiting at most its deadline for it."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(self._deadline_s)

    def _watch(self) -> None:
        if not self._prepare():
            logger.warning_once("waits on the device that hang are not noticed: the CUDA runtime was not found")
            return
        interval = min(_LONGEST_INTERVAL_S, self._deadline_s / 10)
        while not self._stopped.wait(interval):
            with self._lock:
                for buffer in list(self._waits):
                    if self._failure is None:
                        self._failure = self._trouble(buffer)
                if self._failure is not None:
                    logger.error("%s", self._failure)
                    self._give_up()
                    return

    def _trouble(self, buffer: SymmetricBuffer) -> PeerError | None:
        try:
            words = buffer.read_words(self._deadline_s)
        except RuntimeError as error:
            return PeerError(f"group {self._group_name!r}: its signals on the device cannot be read: {error}")
        flags = words[FLAGS::LINE_WORDS]
        self.missing = [place for place, flag in enumerate(flags) if flag < words[WAITING]]
        now, (count, since) = time.monotonic(), self._waits[buffer]
        if words[WAITING] == 0 or words[WAITING] != count:
            self._waits[buffer] = (words[WAITING], now)
            return None
        if now - since <= self._deadline_s:
            return None
        return PeerError(
            f"group {self._group_name!r}: exchange {count} on symmetric memory waits on the device since "
            f"{now - since:.1f} s (deadline {self._deadline_s:g} s) for places {self.missing}, which have not sent "
            f"their parts; the last that Python issued was {self.last_call}. The wait is given up, its result is void "
            "(all bits set), and the group can be used no more",
            self.missing,
        )

    def _give_up(self) -> None:
        """End all waits, also those in other buffers: nobody watches them any more."""
        for buffer in self._waits:
            try:
                buffer.abort(self._deadline_s)
            except RuntimeError as error:
                logger.error("group %r: a wait on the device cannot be ended: %s", self._group_name, error)
