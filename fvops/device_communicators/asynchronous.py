"""Exchanges that are begun and waited for later, so that this rank computes while they are under way.

Ranks must stay in step, so an exchange is counted, checked and recorded where it begins, and every later call of its
group is issued behind it. On CPU a thread of the group carries it out; on an accelerator a stream beside the current
one does, and only the device waits. docs/compiler.md, overlap, says why this keeps the order of eager.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fvops import checks
from fvops.debug import journal
from fvops.device_communicators.library_streams import Streams

if TYPE_CHECKING:
    from fvops.device_communicators.base_device_communicator import DeviceCommunicatorBase

__all__ = ["AtOnce", "Begun", "Later", "SideStream", "Started", "Worker"]

# How often a wait looks whether the thread is still there; what ends it is the transport's deadline.
_LOOK_S = 1.0
# For a thread to end, once the transport has been told to give up.
_END_S = 5.0


class Begun(Protocol):
    """A call under way."""

    def wait(self) -> None:
        """Return once its results may be read; raises what the call raised."""


class Later(Protocol):
    """What carries out the calls of one group that are begun and waited for later."""

    def begin(
        self,
        inputs: list[Tensor],
        op: str,
        tensors: Any,
        arguments: dict[str, Any],
        call: Callable[..., Any],
        *args: Any,
    ) -> Begun:
        """Begin the call; arguments as for `DeviceCommunicatorBase._issue`, and the tensors that it reads."""

    def settle(self) -> None:
        """Have what is issued from here on run behind what was begun."""

    def close(self) -> None:
        """Let nothing go on; RuntimeError when something does."""


class Started:
    """An exchange under way, with the tensors that it fills."""

    def __init__(self, outputs: list[Tensor], begun: Begun) -> None:
        self._outputs = outputs
        self._begun = begun

    def wait(self) -> list[Tensor]:
        """What was received; raises the exchange's own error when it failed. Once: the tensors are the caller's."""
        self._begun.wait()
        outputs, self._outputs = self._outputs, []
        return outputs


class AtOnce:
    """For devices of which nothing is known: a call is over when it has begun."""

    def __init__(self, communicator: DeviceCommunicatorBase) -> None:
        self._communicator = communicator

    def begin(self, inputs: list[Tensor], *call: Any) -> Begun:
        self._communicator._issue(*call)
        return _Over()

    def settle(self) -> None: ...

    def close(self) -> None: ...


class _Over:
    def wait(self) -> None: ...


class Worker:
    """A thread that carries out a group's calls, in the order in which they were begun."""

    def __init__(self, communicator: DeviceCommunicatorBase) -> None:
        self._communicator = communicator
        self._queue: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: _Task | None = None

    def begin(
        self,
        inputs: list[Tensor],
        op: str,
        tensors: Any,
        arguments: dict[str, Any],
        call: Callable[..., Any],
        *args: Any,
    ) -> Begun:
        communicator = self._communicator
        communicator.refuse_if_broken(op)
        noted = communicator._announce(op, tensors, arguments)
        inference = torch.is_inference_mode_enabled()

        def carry_out() -> None:
            if communicator.failure:  # of an exchange before this one
                journal.finish(noted, True)
                communicator.refuse_if_broken(op)
            # Modes belong to a thread. What is filled here was made in the caller's, which no gradient passes through.
            with torch.inference_mode(inference), torch.no_grad():
                communicator._carry_out(noted, call, args)

        if self._thread is None:
            name = f"fvops exchanges of {communicator.unique_name}"
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()
        self._last = task = _Task(carry_out, op, self)
        self._queue.put(task)
        return task

    def settle(self) -> None:
        # An error of the task is its waiter's, and has broken the group, which the next call then says.
        if self._last is not None:
            self._last.see_end()
            self._last = None

    def alive(self) -> bool:
        """Is the thread there? After a fork it is not."""
        return self._thread is not None and self._thread.is_alive()

    def interrupted(self, op: str, error: BaseException) -> None:
        """A wait was cut short: nobody knows what became of the call."""
        self._communicator.break_with(f"{type(error).__name__} in {op}, waiting for its end: {error}")

    def lost(self, op: str) -> RuntimeError:
        """What a call whose thread has gone is told."""
        where = checks.where(op, self._communicator.unique_name)
        return RuntimeError(f"{where}: the thread that carries it out is gone; a forked child cannot use this group")

    def close(self) -> None:
        if self._thread is None or self._thread is threading.current_thread():
            return
        communicator = self._communicator
        self._queue.put(None)
        self._thread.join(communicator.timeout_s)
        if self._thread.is_alive():
            communicator.break_with("the group was destroyed while an exchange was under way")
            self._thread.join(_END_S)
        if self._thread.is_alive():
            raise RuntimeError(f"an exchange of group {communicator.unique_name!r} did not end with it")
        self._thread = None

    def _run(self) -> None:
        while True:
            task = self._queue.get()
            if task is None:
                return
            task.run()
            del task  # holds the exchange's tensors


class _Task:
    def __init__(self, carry_out: Callable[[], None], op: str, worker: Worker) -> None:
        self._carry_out: Callable[[], None] | None = carry_out
        self._op = op
        self._worker = worker
        self._done = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            if self._carry_out is not None:
                self._carry_out()
        except BaseException as error:  # raised where it is waited for
            self._error = error
        finally:
            self._carry_out = None
            self._done.set()

    def wait(self) -> None:
        self.see_end()
        if self._error is not None:
            raise self._error

    def see_end(self) -> None:
        """Return once it has ended, well or not."""
        try:
            while not self._done.wait(_LOOK_S):
                if not self._worker.alive() and not self._done.is_set():
                    raise self._worker.lost(self._op)
        except BaseException as error:
            self._worker.interrupted(self._op, error)
            raise


class SideStream:
    """A stream beside the current one for a group's begun calls. Events keep the order; the host waits for nothing.

    A capture takes the side stream in by the event in `begin`, and has it back by the one in `wait`.
    """

    def __init__(self, communicator: DeviceCommunicatorBase, streams: Streams) -> None:
        self._communicator = communicator
        self._streams = streams
        self._side = streams.side()
        # The calls that nobody has waited for; each keeps its tensors from the allocator.
        self._open: list[_OnStream] = []

    def begin(self, inputs: list[Tensor], *call: Any) -> Begun:
        current = self._current()
        self._side.wait_event(self._streams.mark(current))
        with self._streams.use(self._side):
            self._communicator._issue(*call)
        begun = _OnStream(self, self._streams.mark(self._side), (inputs, call))
        self._open.append(begun)
        return begun

    def settle(self) -> None:
        # Not for what `begin` issues: the side stream is in order by itself, and its tensors must stay.
        if self._open and self._current() != self._side:
            self.pass_(self._open[-1])

    def close(self) -> None:
        self._open.clear()

    def pass_(self, begun: _OnStream) -> None:
        """Have the current stream wait for `begun`, and with it for what was begun before."""
        if begun in self._open:
            self._current().wait_event(begun.event)
            del self._open[: self._open.index(begun) + 1]

    def _current(self) -> Any:
        return self._streams.resolve("all_to_all_4D_start", self._communicator.unique_name, None)


class _OnStream:
    def __init__(self, owner: SideStream, event: Any, kept: Any) -> None:
        self.event = event
        self._owner = owner
        self._kept = kept

    def wait(self) -> None:
        self._owner.pass_(self)
        self._kept = None
