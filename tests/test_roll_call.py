"""RollCall where there is no store to ask any more: its text says so, and nothing is raised over the first error."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch.distributed as dist

from fvops.debug import journal, patience
from fvops.debug.calls import Member
from fvops.device_communicators.roll_call import RollCall
from tests.waiting import wait_until


@pytest.mark.parametrize("ask", [RollCall.describe, RollCall.waiting])
@pytest.mark.parametrize("error", [None, KeyError("a group"), dist.DistNetworkError("reset")])
def test_without_a_store_it_says_so(monkeypatch: pytest.MonkeyPatch, ask: Any, error: Exception | None) -> None:
    assert not dist.is_initialized()
    if error is not None:

        def fail() -> Any:
            raise error

        monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", fail)
    text = ask(RollCall("a", 1, 0), "collective 1", range(2), [0, 1])
    assert "cannot be told, the store is gone" in text


def test_who_may_be_waiting_still_is_not_called_missing_for_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr("fvops.device_communicators.roll_call._WINDOW_S", 0.1)
    first, second = RollCall("a", 1, 0), RollCall("a", 1, 1)
    both = "missing: place 1 (global rank 5), place 2 (global rank 6), of whom some may wait in it still"
    assert first.describe("collective 1", range(3), [4, 5, 6]) == both
    assert second.describe("collective 1", range(3), [4, 5, 6]) == "missing: place 2 (global rank 6)"


class _Communicator:
    """As much of one as the warnings ask for."""

    class transport:
        waiting_for = staticmethod(list)

    def __init__(self, member: Member) -> None:
        self.member = member
        self.roll_call = RollCall(member.group, member.life, member.place)


def test_the_warnings_go_on_after_torch_distributed_is_gone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FVOPS_WARN_AFTER_S", "0.05")
    member = Member("of a test", 1, 0, (0, 1), 300.0)
    monkeypatch.setattr("fvops.registry._communicators", {member.group: _Communicator(member)})
    noted = journal.begin(member, "all_reduce", "collective", 1, None, {})
    ended = threading.Event()
    thread = threading.Thread(target=patience._watch, args=(ended,), daemon=True)
    try:
        with caplog.at_level(logging.WARNING, logger="fvops.debug.patience"):
            logging.getLogger("fvops.debug.patience").addHandler(caplog.handler)
            thread.start()
            # The second comes only if the first did not end the thread.
            wait_until(lambda: sum("the store is gone" in record.getMessage() for record in caplog.records) >= 2)
    finally:
        logging.getLogger("fvops.debug.patience").removeHandler(caplog.handler)
        ended.set()
        journal.finish(noted)
    thread.join(30)
    assert not thread.is_alive()
