"""Deadlines for calls into a communication library: no call blocks for ever, and a failed one ends the communicator.

Each call is noted before it starts and struck off when it returns; on an accelerator an event marks when the device is
done with it. A daemon thread, started at the first call, looks at both. What is overdue, or an error that the library
reports outside a call, breaks the communicator: the thread aborts it, which wakes the blocked call, and that call and
all later ones raise `BrokenCommunicatorError`. Calls that are being captured into a CUDA graph have no event, and what
a replayed graph does is not watched.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from fvops.checks import where
from fvops.device_communicators.library_loading import LibraryError
from fvops.logger import init_logger

__all__ = ["BrokenCommunicatorError", "Watchdog", "bounded"]

T = TypeVar("T")
logger = init_logger(__name__)

# The thread looks this often, in seconds: often enough to be at most a tenth of the deadline late.
_LONGEST_INTERVAL_S = 1.0


class BrokenCommunicatorError(RuntimeError):
    """A call failed or was late, now or earlier, and the communicator was aborted."""


class Call(NamedTuple):
    """A call by its name and number; `started` is on the monotonic clock, in seconds."""

    op: str
    number: int
    started: float


class Watchdog:
    """Runs calls of one communicator, one at a time, and sees them through.

    Args:
        group_name: for messages.
        deadline_s: how long a call may take on the host, and on the device after that, in seconds.
        abort: ends the communicator, whatever waits in it; called once, from any thread.
        async_error: the text of an error that the library reports outside a call, or None.
        busy: is a group of calls open, so that aborting would pull the communicator from under it?
        prepare: called in the thread before it looks at events; False when it may not look at them.

    Attributes:
        reason: why the communicator is broken, None while it is whole.
    """

    def __init__(
        self,
        group_name: str,
        deadline_s: float,
        *,
        abort: Callable[[], None],
        async_error: Callable[[], str | None],
        busy: Callable[[], bool],
        prepare: Callable[[], bool],
    ) -> None:
        self.reason: str | None = None
        self.deadline_s = deadline_s
        self._group_name = group_name
        self._abort, self._async_error, self._busy, self._prepare = abort, async_error, busy, prepare
        self._calls = 0
        self._current: Call | None = None
        self._one_call = threading.RLock()
        self._one_reason = threading.Lock()
        self._events: deque[tuple[Any, Call]] = deque()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def run(self, op: str, function: Callable[..., T], *args: Any) -> T:
        """``function(*args)``, which calls into the library for `op`.

        Raises:
            BrokenCommunicatorError: the call failed, did not return in time, or the communicator was broken before.
        """
        if not self._one_call.acquire(timeout=2 * self.deadline_s):
            raise BrokenCommunicatorError(
                f"{where(op, self._group_name)}: another thread's call, {self._current}, does not end"
            )
        try:
            self._calls += 1
            call = Call(op, self._calls, time.monotonic())
            # In this order: the thread sets the reason, then looks for a current call before it aborts. So whoever
            # finds no reason here cannot have the communicator aborted before its call is overdue.
            self._current = call
            try:
                self._raise_if_broken(call)
                if self._thread is None:
                    self._start()
                try:
                    result = function(*args)
                except LibraryError as error:
                    cause = error
                else:
                    self._raise_if_broken(call)
                    return result
            finally:
                self._current = None
            self.break_with(self._describe(call, str(cause)))
            raise self._error(call) from cause
        finally:
            self._one_call.release()

    def follow(self, op: str, event: Any) -> None:
        """The device is done with the last call, of `op`, when `event` is complete."""
        self._events.append((event, Call(op, self._calls, time.monotonic())))

    def raise_if_broken(self, op: str) -> None:
        """BrokenCommunicatorError when the communicator is broken."""
        self._raise_if_broken(Call(op, self._calls + 1, 0.0))

    def break_with(self, reason: str) -> None:
        """Break the communicator, unless it is broken already."""
        with self._one_reason:
            if self.reason is not None:
                return
            self.reason = reason
        logger.error("%s", reason)
        self._stopped.set()
        # An abort may itself wait for the device: never longer than the deadline.
        if not bounded(f"abort of {self._group_name}", self._abort, self.deadline_s):
            logger.warning("aborting the communicator of group %r took more than its deadline", self._group_name)

    def stop(self) -> None:
        """End the thread; what is under way is no longer watched. `reason` changes afterwards by `break_with` only."""
        with self._one_reason:
            self._stopped.set()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._watch, name=f"fvops watchdog of {self._group_name}", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        looks_at_events = self._prepare()
        if not looks_at_events:
            logger.warning_once("calls that hang on the device are not noticed: the CUDA runtime was not found")
        interval = min(_LONGEST_INTERVAL_S, self.deadline_s / 10)
        while not self._stopped.wait(interval):
            try:
                reason = self._trouble(looks_at_events)
            except RuntimeError as error:  # a device error, found by asking an event or the library
                reason = f"the communicator of group {self._group_name!r} cannot be asked: {error}"
            if reason is not None:
                self._break_from_outside(reason)
                return

    def _trouble(self, looks_at_events: bool) -> str | None:
        call = self._current
        if call is not None and self._late(call.started):
            return self._describe(call, "it did not return within its deadline")
        while looks_at_events and self._events:
            event, issued = self._events[0]
            if not event.query():
                if self._late(issued.started):
                    return self._describe(issued, "the device did not finish it within its deadline")
                break
            self._events.popleft()
        if not looks_at_events:
            self._events.clear()
        error = self._async_error()
        return None if error is None else f"the communicator of group {self._group_name!r} failed: {error}"

    def _break_from_outside(self, reason: str) -> None:
        """Break it while another thread may be in a call: one that is not late itself gets to return first."""
        with self._one_reason:
            if self.reason is not None or self._stopped.is_set():
                return
            self.reason = reason
        logger.error("%s", reason)
        since = time.monotonic()
        while not self._late(since):
            call = self._current
            if (call is None and not self._busy()) or (call is not None and self._late(call.started)):
                break
            time.sleep(min(0.01, self.deadline_s / 10))
        self._abort()

    def _late(self, started: float) -> bool:
        return time.monotonic() - started > self.deadline_s

    def _describe(self, call: Call, cause: str) -> str:
        return f"{where(call.op, self._group_name)}, call {call.number}, deadline {self.deadline_s:g} s: {cause}"

    def _raise_if_broken(self, call: Call) -> None:
        if self.reason is not None:
            raise self._error(call)

    def _error(self, call: Call) -> BrokenCommunicatorError:
        return BrokenCommunicatorError(
            f"{where(call.op, self._group_name)}: call {call.number}: the communicator is broken: {self.reason}"
        )


def bounded(name: str, function: Callable[[], None], deadline_s: float) -> bool:
    """Run `function` in a thread and wait at most `deadline_s` seconds; False when it is still running.

    Raises:
        Exception: what `function` raised.
    """
    failures: list[Exception] = []

    def run() -> None:
        try:
            function()
        except Exception as error:  # handed to the caller below
            failures.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    thread.join(deadline_s)
    if failures:
        raise failures[0]
    return not thread.is_alive()
