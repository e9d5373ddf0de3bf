"""One rank's shared memory, as words, as bytes and as tensors.

The file is sparse, and touching a page that tmpfs has no room for kills the process (SIGBUS). So nothing is touched
before `reserve` has allocated it: the control area and the slots at creation, the pool as it grows.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from fvops.device_communicators.shm import futex
from fvops.device_communicators.shm.segment_layout import SegmentLayout

__all__ = ["Segment", "reserve"]

# Tensors made of segments are kept, up to so many for each segment: making one costs more than a small copy.
_MOST_KEPT = 256
# Other users of the file system (data loaders, NCCL) die of a full one: the pool leaves them this part of it.
_LEFT_FREE = 0.25


class Segment:
    """A mapping of an open file of `layout.segment_bytes`. The mapping lives as long as any tensor in it.

    Attributes:
        words: the control area as 32-bit words.
        quads: the same as 64-bit words.
        memory: the whole segment as bytes.
        address: where it is mapped in this process.
    """

    def __init__(self, descriptor: int, layout: SegmentLayout) -> None:
        self.layout = layout
        self.size = layout.segment_bytes
        mapping = mmap.mmap(descriptor, self.size)
        self.memory = memoryview(mapping)
        control = self.memory[: layout.control_bytes]
        self.words = control.cast("I")
        self.quads = control.cast("Q")
        # Written to later in any mode, which a tensor made in inference mode would refuse.
        with torch.inference_mode(False):
            whole = torch.frombuffer(mapping, dtype=torch.uint8)
        self._typed: dict[torch.dtype, Tensor] = {torch.uint8: whole}
        self._kept: dict[tuple[int, Sequence[int], Sequence[int] | None, torch.dtype], Tensor] = {}
        self.address = whole.data_ptr()

    def publish(self, index: int, value: int) -> None:
        """Set a word after everything this thread has written before, and wake who sleeps on it."""
        address = self.address + 4 * index
        if futex.WEAKLY_ORDERED:
            futex.wake(address)
        self.words[index] = value
        futex.wake(address)

    def tensor(self, offset: int, shape: Sequence[int], strides: Sequence[int] | None, dtype: torch.dtype) -> Tensor:
        """The tensor of `shape` at byte `offset`; `strides` None means contiguous."""
        key = (offset, shape, strides, dtype)
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            # It will be used under other modes than this one.
            with torch.inference_mode(False), torch.no_grad():
                found = self._kept[key] = self.make(*key)
        return found

    def make(self, offset: int, shape: Sequence[int], strides: Sequence[int] | None, dtype: torch.dtype) -> Tensor:
        """As `tensor`, for one use."""
        flat = self._typed.get(dtype)
        if flat is None:
            with torch.inference_mode(False), torch.no_grad():
                flat = self._typed[dtype] = self._typed[torch.uint8].view(dtype)
        if strides is None:
            return flat.narrow(0, offset // dtype.itemsize, math.prod(shape)).view(shape)
        return flat.as_strided(shape, strides, offset // dtype.itemsize)

    def offset_of(self, tensor: Tensor) -> int:
        """Byte offset of the first element of `tensor`; 0 when it lies outside (offset 0 is never a result's)."""
        offset = tensor.data_ptr() - self.address
        return offset if 0 <= offset < self.size else 0


def reserve(descriptor: int, offset: int, nbytes: int, *, considerate: bool) -> str:
    """Allocate the pages of ``[offset, offset + nbytes)``; empty when done, else why not.

    Args:
        considerate: refuse as well when little of the file system would be left for others.
    """
    if considerate:
        room = os.fstatvfs(descriptor)
        if (room.f_bavail * room.f_frsize - nbytes) < _LEFT_FREE * room.f_blocks * room.f_frsize:
            return f"less than {_LEFT_FREE:.0%} of the file system would be left"
    try:
        os.posix_fallocate(descriptor, offset, nbytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
            raise
        return f"no room for {nbytes} bytes ({error.strerror})"
    return ""
