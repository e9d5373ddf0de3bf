"""Sends that nobody waits for: whatever goes wrong in one of them is told, and the others go on."""

from __future__ import annotations

import pytest

from fvops.device_communicators.pending_sends import PendingSends


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, OSError])
def test_a_send_that_fails_is_told_and_later_ones_are_seen_through(kind: type[Exception]) -> None:
    done: list[int] = []

    def fails() -> None:
        raise kind("the wire is cut")

    sends = PendingSends("sp:0")
    sends.add(fails, None)
    sends.add(lambda: done.append(2), None)
    with pytest.raises(RuntimeError, match="an earlier send was not received: the wire is cut"):
        sends.drain(10)
    assert done == [2]
