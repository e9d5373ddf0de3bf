"""The watchdog on its own: device events, groups that are open, and the order in which it ends a communicator.

Events are stand-ins: what a real device does needs one.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from fvops.device_communicators.library_loading import LibraryError
from fvops.device_communicators.library_streams import Streams
from fvops.device_communicators.library_watchdog import BrokenCommunicatorError, Watchdog, bounded
from tests.waiting import wait_until

PATIENCE_S = 20.0  # for what must happen soon


class Event:
    """Complete when told so."""

    def __init__(self, complete: bool = False) -> None:
        self.complete = complete

    def query(self) -> bool:
        return self.complete


class Watched:
    """A watchdog with everything around it written down."""

    def __init__(self, deadline_s: float = 0.3) -> None:
        self.aborted = threading.Event()
        self.error: str | None = None
        self.busy = False
        self.dog = Watchdog(
            "g",
            deadline_s,
            abort=self.aborted.set,
            async_error=lambda: self.error,
            busy=lambda: self.busy,
            prepare=lambda: True,
        )


def test_a_device_that_does_not_finish_breaks_the_communicator() -> None:
    w = Watched()
    assert w.dog.run("send", lambda: 5) == 5
    w.dog.follow("send", Event(complete=True))
    w.dog.run("recv", lambda: None)
    w.dog.follow("recv", Event())
    wait_until(w.aborted.is_set)
    assert w.dog.reason == (
        "fvops.recv on group 'g', call 2, deadline 0.3 s: the device did not finish it within its deadline"
    )
    with pytest.raises(BrokenCommunicatorError, match=r"fvops.all_reduce on group 'g': call 3: .*fvops.recv"):
        w.dog.run("all_reduce", lambda: None)


def test_a_device_that_finishes_leaves_it_whole() -> None:
    w = Watched()
    w.dog.run("send", lambda: None)
    events = [Event() for _ in range(3)]
    for event in events:
        w.dog.follow("send", event)
    for event in events:
        event.complete = True
    wait_until(lambda: not w.dog._events)
    assert not w.aborted.wait(3 * w.dog.deadline_s)
    assert w.dog.reason is None
    w.dog.stop()


def test_an_error_outside_a_call_is_found() -> None:
    w = Watched()
    w.dog.run("send", lambda: None)
    w.error = "a link went down"
    wait_until(w.aborted.is_set)
    assert w.dog.reason == "the communicator of group 'g' failed: a link went down"


def test_an_open_group_gets_to_close_before_the_abort() -> None:
    w = Watched(deadline_s=5.0)
    w.dog.run("group_start", lambda: None)
    w.busy, w.error = True, "a link went down"
    wait_until(lambda: w.dog.reason is not None)
    assert not w.aborted.is_set()
    w.busy = False
    wait_until(w.aborted.is_set)


def test_a_call_that_is_not_late_returns_before_the_abort_and_raises() -> None:
    w = Watched(deadline_s=5.0)
    w.dog.run("send", lambda: None)

    def call() -> None:
        w.error = "a link went down"
        wait_until(lambda: w.dog.reason is not None)
        assert not w.aborted.is_set()

    with pytest.raises(BrokenCommunicatorError, match=r"fvops.recv on group 'g': call 2: .*a link went down"):
        w.dog.run("recv", call)
    wait_until(w.aborted.is_set)


def test_a_failed_call_aborts_at_once_and_other_errors_do_not() -> None:
    w = Watched(deadline_s=60.0)
    with pytest.raises(KeyError):
        w.dog.run("send", {}.__getitem__, "no library's fault")
    assert w.dog.reason is None

    def fail() -> None:
        raise LibraryError("ncclSend", 3, "internal error")

    with pytest.raises(BrokenCommunicatorError, match="ncclSend failed with code 3: internal error"):
        w.dog.run("send", fail)
    assert w.aborted.is_set()


def test_an_event_that_cannot_be_asked_breaks_the_communicator() -> None:
    class Bad:
        def query(self) -> bool:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    w = Watched()
    w.dog.run("send", lambda: None)
    w.dog.follow("send", Bad())
    wait_until(w.aborted.is_set)
    assert "illegal memory access" in str(w.dog.reason)


def test_bounded_returns_hands_on_errors_and_gives_up() -> None:
    assert bounded("quick", lambda: None, PATIENCE_S)
    with pytest.raises(KeyError):
        bounded("bad", lambda: {}["x"], PATIENCE_S)
    release = threading.Event()
    assert not bounded("slow", lambda: release.wait() and None, 0.05)
    release.set()


def test_streams_follow_events_but_not_while_capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for torch.cuda's streams."""

    class Stream:
        cuda_stream = 17

        def __enter__(self) -> None: ...
        def __exit__(self, *exc: object) -> None: ...

    class CudaEvent:
        stream: Any = None

        def record(self, stream: Any) -> None:
            self.stream = stream

    current, capturing = Stream(), [False]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "Event", CudaEvent)
    streams = Streams(torch.device("cuda", 0))
    assert streams.resolve("send", "g", None) is current
    assert streams.handle(current) == 17
    assert streams.event(current).stream is current
    capturing[0] = True
    assert streams.event(current) is None
    with pytest.raises(
        TypeError, match=r"fvops.send on group 'g': stream must be a torch.cuda.Stream or None, got int"
    ):
        streams.resolve("send", "g", 17)
