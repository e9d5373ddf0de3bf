"""Recording collectives: what the transports are asked to do, in order, in this process.

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

from fvops.debug.calls import Call, observers

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


@contextmanager
def record_collectives() -> Iterator[list[CollectiveRecord]]:
    """Collect a `CollectiveRecord` for every collective that any thread of this process issues inside the block."""
    records: list[CollectiveRecord] = []

    def append(call: Call) -> None:
        entry = _record(call)
        with _lock:
            records.append(entry)

    observers.append(append)
    try:
        yield records
    finally:
        observers.remove(append)


def canonical(records: list[CollectiveRecord]) -> list[tuple[str, str, int]]:
    """`records` as ``(group, op, bytes)``: what must agree between eager and compiled, and between ranks."""
    return [(record.group, record.op, record.nbytes) for record in records]


def _record(call: Call) -> CollectiveRecord:
    return CollectiveRecord(
        group=call.member.group,
        op=call.op,
        shapes=tuple(tuple(tensor.shape) for tensor in call.tensors),
        dtype=call.tensors[0].dtype if call.tensors else None,
        arguments=tuple(call.arguments.items()),
        nbytes=sum(tensor.numel() * tensor.element_size() for tensor in call.tensors),
    )
