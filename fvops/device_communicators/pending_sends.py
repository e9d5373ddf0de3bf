"""Sends that nobody waits for: a thread that sees each one through, so that `send` returns before its receiver posts.

gloo finishes a large send only once the receiver has posted. If `send` waited, a ring in which every rank sends first
would deadlock; a work object that is merely kept is never seen to finish, for gloo reports completion to a waiter only.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["PendingSends"]


class PendingSends:
    """Runs, in order, what `add` is handed, keeping the buffers alive meanwhile.

    A send that fails (its deadline is the transport's) is reported by the next call of `raise_failure` or `drain`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def add(self, see_through: Callable[[], Any], buffer: Any) -> None:
        """Call `see_through`, which reads `buffer` until it returns."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"fvops sends of {self._name}", daemon=True)
            self._thread.start()
        self._queue.put((see_through, buffer))

    def raise_failure(self) -> None:
        """RuntimeError when an earlier send failed."""
        if self._failure is not None:
            raise RuntimeError(f"an earlier send was not received: {self._failure}") from self._failure

    def drain(self, timeout: float) -> None:
        """Wait until every send is done, at most `timeout` seconds; RuntimeError when one failed or is still open."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise RuntimeError(f"sends of group {self._name!r} were not received within {timeout:g} s")
            self._thread = None
        self.raise_failure()

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                return
            see_through, buffer = item
            try:
                see_through()
            except Exception as error:  # whatever it is: `raise_failure` tells it, and later sends go on
                self._failure = self._failure or error
            del see_through, buffer, item
