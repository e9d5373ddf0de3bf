"""Memory for results: leases of this rank's segment that come back when the tensor's storage dies.

A lease is a slice of the segment's memoryview. The tensor made of it keeps the slice alive, whatever views of its
storage there are, and a weak reference to the slice tells of its death. That can happen on any thread and in the middle
of any Python code, this module's included: the callback only appends to a deque, and `lease` looks there later.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from fvops.device_communicators.shm.segment import Segment, reserve
from fvops.device_communicators.shm.segment_layout import PAGE, round_up

__all__ = ["Pool"]

# What the pool asks the file system for at once.
_GROWTH = 8 << 20


class _Lease(weakref.ref):
    """A weak reference to a leased slice that knows where the slice was."""

    __slots__ = ("offset", "size")
    offset: int
    size: int


class Pool:
    """Leases of ``[layout.pool_start, segment.size)``. Takes over `descriptor`, the segment's file.

    Sizes are rounded up to classes an eighth apart, and a class's last returned block is the first leased again: its
    pages are mapped and perhaps still in cache. Blocks are split and merged only when there is no fresh memory left.
    """

    def __init__(self, segment: Segment, descriptor: int) -> None:
        self._segment = segment
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._returned: deque[_Lease] = deque()
        self._leases: dict[int, _Lease] = {}
        self._free: dict[int, list[int]] = {}
        self._frontier = self._reserved = segment.layout.pool_start

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """A contiguous tensor, not a view, of leased memory; None when there is no room."""
        numel = math.prod(shape)
        nbytes = numel * dtype.itemsize
        if nbytes == 0:
            return None
        size = _size_class(nbytes)
        with self._lock:
            offset = self._take(size)
            if offset is None:
                return None
            memory = self._segment.memory[offset : offset + size]
            lease = _Lease(memory, self._returned.append)
            lease.offset, lease.size = offset, size
            self._leases[offset] = lease
        # resize_ within the storage gives the shape without making a view.
        return torch.frombuffer(memory, dtype=dtype, count=numel).resize_(tuple(shape))

    def leased_bytes(self) -> int:
        """How much is leased now."""
        with self._lock:
            self._collect()
            return sum(lease.size for lease in self._leases.values())

    def close(self) -> None:
        """Close the file. Tensors in use stay valid; nothing is leased any more."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._descriptor = -1

    def _take(self, size: int) -> int | None:
        self._collect()
        if self._descriptor < 0:
            return None
        blocks = self._free.get(size)
        if blocks:
            return blocks.pop()
        if self._frontier + size <= self._reserved or self._grow(size):
            self._frontier += size
            return self._frontier - size
        return self._split(size)

    def _collect(self) -> None:
        while self._returned:
            lease = self._returned.popleft()
            del self._leases[lease.offset]
            self._free.setdefault(lease.size, []).append(lease.offset)

    def _grow(self, size: int) -> bool:
        needed = self._frontier + size - self._reserved
        if self._frontier + size > self._segment.size:
            return False
        for growth in (min(max(needed, _GROWTH), self._segment.size - self._reserved), needed):
            if not reserve(self._descriptor, self._reserved, round_up(growth, PAGE), considerate=True):
                self._reserved += round_up(growth, PAGE)
                return True
        return False

    def _split(self, size: int) -> int | None:
        """Cut `size` from the smallest block that holds it, after merging neighbours where none does."""
        fitting = [block for block, offsets in self._free.items() if offsets and block >= size]
        if not fitting:
            self._merge()
            fitting = [block for block, offsets in self._free.items() if offsets and block >= size]
            if not fitting:
                return None
        block = min(fitting)
        offset = self._free[block].pop()
        if block > size:
            self._free.setdefault(block - size, []).append(offset + size)
        return offset

    def _merge(self) -> None:
        blocks = sorted((offset, size) for size, offsets in self._free.items() for offset in offsets)
        if self._frontier < self._reserved:
            blocks.append((self._frontier, self._reserved - self._frontier))
            self._frontier = self._reserved
        self._free.clear()
        start, end = 0, 0
        for offset, size in [*blocks, (-1, 0)]:
            if offset != end:
                if end > start:
                    self._free.setdefault(end - start, []).append(start)
                start = offset
            end = offset + size


def _size_class(nbytes: int) -> int:
    step = max(64, 1 << max(0, nbytes.bit_length() - 4))
    if nbytes >= PAGE:
        step = max(step, PAGE)
    return round_up(nbytes, step)
