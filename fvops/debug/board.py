"""The notice board of `check_collectives`: small texts in torch.distributed's store, which no transport uses.

Keys lie under one prefix. Nothing here blocks: who waits asks again, so that one thread's wait never holds the store's
only connection against another's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist

__all__ = ["Board", "pauses"]

_PREFIX = "fvops/check"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.0002, 0.02


class Board:
    """Notices by key. Every method raises RuntimeError when the store's server is gone."""

    def __init__(self) -> None:
        self._store: Any = dist.distributed_c10d._get_default_store()

    def post(self, key: str, text: str) -> None:
        """Put up `text` under `key`, over what was there."""
        with _gone():
            self._store.set(f"{_PREFIX}/{key}", text)

    def read(self, key: str) -> str | None:
        """What is under `key`; None if nothing is."""
        with _gone():
            return (
                self._store.get(f"{_PREFIX}/{key}").decode(errors="replace")
                if self._store.check([f"{_PREFIX}/{key}"])
                else None
            )

    def read_all(self, keys: Iterable[str]) -> list[str]:
        """What is under `keys`, all of which are there, in one round trip."""
        with _gone():
            return [
                text.decode(errors="replace") for text in self._store.multi_get([f"{_PREFIX}/{key}" for key in keys])
            ]

    def holds(self, keys: Iterable[str]) -> bool:
        """Is there something under each of `keys`?"""
        with _gone():
            return bool(self._store.check([f"{_PREFIX}/{key}" for key in keys]))

    def take_down(self, key: str) -> None:
        """Remove what is under `key`."""
        with _gone():
            self._store.delete_key(f"{_PREFIX}/{key}")


@contextlib.contextmanager
def _gone() -> Iterator[None]:
    """Says what an error of the store means."""
    try:
        yield
    except RuntimeError as error:  # DistStoreError and DistNetworkError are RuntimeErrors
        raise RuntimeError(
            "the ranks cannot compare their calls any more: torch.distributed's store is gone, "
            f"and with it perhaps global rank 0 ({str(error).splitlines()[0]})"
        ) from error


def pauses() -> Iterator[float]:
    """Sleep a little longer each time; yields the seconds since the first."""
    start, pause = time.monotonic(), _FIRST_PAUSE_S
    while True:
        yield time.monotonic() - start
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)
