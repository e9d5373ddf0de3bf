"""Waiting in tests for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["wait_until"]


def wait_until(condition: Callable[[], bool], deadline_s: float = 30.0) -> None:
    """Return once `condition` holds; AssertionError when it does not within `deadline_s`."""
    until = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < until, f"it did not happen within {deadline_s:g} s"
        time.sleep(0.002)
