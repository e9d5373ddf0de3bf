"""Bytes of any length through a `torch.distributed.Store`, in pieces, each wait with a deadline.

torch's TCPStore closes the connection on a value above 8 MiB. The first piece carries the length, which the reader
checks before it takes memory; it takes it piece by piece as they come.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fvops.serialization import check_size

__all__ = ["PIECE_BYTES", "StoreTimeout", "delete", "missing", "own_client", "put", "take", "wait_for"]

PIECE_BYTES = 4 << 20
_LENGTH = struct.Struct("<Q")


class StoreTimeout(RuntimeError, TimeoutError):
    """A key did not come within the deadline; `keys` are those that did not."""

    def __init__(self, keys: Sequence[str], seconds: float, reason: str) -> None:
        super().__init__(f"nothing came within {seconds:g} s under {list(keys)} ({reason})")
        self.keys = list(keys)


def put(store: Any, key: str, data: bytes | bytearray) -> list[str]:
    """Leave `data` under `key`; the keys that it took."""
    view = memoryview(data)
    names = [f"{key}/{index}" for index in range(max(1, -(-len(view) // PIECE_BYTES)))]
    # The first piece last: whoever finds it finds the others.
    for index in reversed(range(len(names))):
        piece = bytes(view[index * PIECE_BYTES : (index + 1) * PIECE_BYTES])
        store.set(names[index], (_LENGTH.pack(len(view)) if index == 0 else b"") + piece)
    return names


def take(store: Any, key: str, seconds: float) -> tuple[bytearray, list[str]]:
    """What lies, or will within `seconds`, under `key`; and the keys that it took.

    Raises:
        StoreTimeout: nothing came, or not all of it.
        ValueError: it is no message, or larger than is allowed.
    """
    until = time.monotonic() + seconds
    wait_for(store, [f"{key}/0"], seconds)
    piece = store.get(f"{key}/0")
    if len(piece) < _LENGTH.size:
        raise ValueError(f"the message under {key!r} in the store is cut short: {len(piece)} bytes")
    total: int = _LENGTH.unpack(piece[: _LENGTH.size])[0]
    check_size(total, f"the message under {key!r} in the store")
    data, names = bytearray(piece[_LENGTH.size :]), [f"{key}/0"]
    while len(data) < total:
        names.append(f"{key}/{len(names)}")
        left = until - time.monotonic()
        if left <= 0:
            # However many small pieces there are: each is there at once, and all together never end.
            raise StoreTimeout(names[-1:], seconds, f"{len(data)} of {total} bytes came, in {len(names) - 1} pieces")
        wait_for(store, names[-1:], left)
        piece = store.get(names[-1])
        if not piece:
            break
        data += piece
        if len(piece) > PIECE_BYTES:
            break
    if len(data) != total:
        raise ValueError(f"the message under {key!r} in the store has {len(data)} bytes where {total} were announced")
    return data, names


def wait_for(store: Any, keys: list[str], seconds: float) -> None:
    """Return once all of `keys` exist; `StoreTimeout`, with the missing ones, after `seconds`."""
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except RuntimeError as error:  # DistStoreError, and DistNetworkError when the server is gone
        absent = missing(store, keys)
        if not absent:
            return
        raise StoreTimeout(absent, seconds, str(error).splitlines()[0]) from error


def missing(store: Any, keys: Sequence[str]) -> list[str]:
    """Those of `keys` that do not exist; RuntimeError when the store's server is gone."""
    try:
        return [key for key in keys if not store.check([key])]
    except RuntimeError as error:
        raise RuntimeError(f"the store cannot be asked any more, its server may be gone: {error}") from error


def delete(store: Any, keys: Sequence[str]) -> None:
    """Remove `keys`."""
    for key in keys:
        store.delete_key(key)


def own_client(store: Any, prefix: str) -> Any:
    """`store` under `prefix`, over a connection of its own: a wait on a shared one holds up everybody else's calls."""
    return dist.PrefixStore(prefix, store.clone())
