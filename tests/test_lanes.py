"""Lanes: making one waits for its other end, on a connection to the store that nobody else uses."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fvops.device_communicators.lanes import Lanes
from fvops.device_communicators.library_streams import Streams
from fvops.utils import StatelessProcessGroup

WAIT_S = 8.0


class _Comm:
    NAME = "none"
    available = True

    def send(self, *args: Any, **kwargs: Any) -> None: ...

    def destroy(self) -> None: ...


def test_a_sender_that_waits_for_its_receiver_does_not_hold_up_the_default_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    inside = threading.Event()

    def make(pair: StatelessProcessGroup, name: str) -> Any:
        inside.set()
        pair.barrier()
        return _Comm()

    lanes = Lanes(make, "of a test", 0, Streams(torch.device("cpu")), WAIT_S)
    lanes.send(torch.ones(1), 1)
    assert inside.wait(30)
    time.sleep(0.3)  # the thread is about to wait, and tells nobody when it does
    began = time.monotonic()
    store.set("of another call", "")
    assert store.check(["of another call"])
    assert time.monotonic() - began < WAIT_S / 2
    # The receiver comes, and the lane is made.
    other = Lanes(make, "of a test", 1, Streams(torch.device("cpu")), WAIT_S)
    other._open("of a test/0-1", 1)
    lanes.close(WAIT_S)
