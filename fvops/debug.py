"""Watching collectives: a recorder that sees what the transports are asked to do, in order, in this process.

Entries are made where a device communicator hands data to its transport, not where Python calls a method: a compiled
graph, a backward thread and an eager call all leave the same trace. A CUDA-graph replay runs no Python and therefore
records nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["CollectiveRecord", "canonical", "record_collectives"]


@dataclass(frozen=True)
class CollectiveRecord:
    """One collective as the transport got it on this rank.

    Attributes:
        group: the group's ``unique_name``.
        op: the op's name, as in ``torch.ops.fvops``.
        shapes: the shape of each tensor handed in (for `recv`, of the one received).
        dtype: their dtype; None for `barrier`.
        arguments: the op's other arguments that the transport saw (dims, splits, peer, reduction).
        nbytes: bytes of the tensors in `shapes`.
    """

    group: str
    op: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype | None
    arguments: tuple[tuple[str, Any], ...]
    nbytes: int


_lock = threading.Lock()
# The lists of the open `record_collectives` blocks; the communicators look here before they make an entry.
recorders: list[list[CollectiveRecord]] = []


@contextmanager
def record_collectives() -> Iterator[list[CollectiveRecord]]:
    """Collect a `CollectiveRecord` for every collective that any thread of this process issues inside the block."""
    records: list[CollectiveRecord] = []
    with _lock:
        recorders.append(records)
    try:
        yield records
    finally:
        with _lock:
            # By identity: two recorders may hold equal lists.
            recorders[:] = [other for other in recorders if other is not records]


def canonical(records: list[CollectiveRecord]) -> list[tuple[str, str, int]]:
    """`records` as ``(group, op, bytes)``: what must agree between eager and compiled, and between ranks."""
    return [(record.group, record.op, record.nbytes) for record in records]


def record(entry: CollectiveRecord) -> None:
    """Append `entry` to every open recorder (called by the device communicators)."""
    with _lock:
        for records in recorders:
            records.append(entry)
