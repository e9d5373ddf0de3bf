"""A ring of chunks in shared memory: one writer, several readers, each reader sees every chunk.

The writer counts chunks written, each reader chunks read, modulo 2**32, each counter in a cache line of its own. A slot
is free once every reader has passed it. Who waits sleeps on a counter with a futex, and looks from time to time whether
the other side still lives.

    line 0          chunks written; line 1: the writer's state          written by the writer
    line 2+2i       chunks read; line 3+2i: the reader's state          reader i
    then slots of   [chunk bytes: 4][is first: 4][object bytes: 8][chunk]
"""

from __future__ import annotations

import mmap
import struct
import time

import torch

from fvops.device_communicators.shm import futex
from fvops.device_communicators.shm.peers import Peer
from fvops.serialization import check_size

__all__ = ["Ring", "RingReader", "RingWriter", "ring_bytes"]

_LINE_WORDS = 16
_HEADER = struct.Struct("<IIQ")
_HEADER_BYTES = _HEADER.size
_MASK = (1 << 32) - 1
_LEFT = 1
# How long a sleep lasts before the other side is looked at, seconds.
_SLICE_S = 0.25


def ring_bytes(chunk_bytes: int, chunks: int, readers: int) -> int:
    """Size of the shared memory."""
    return 64 * (2 + 2 * readers) + chunks * _stride(chunk_bytes)


def _stride(chunk_bytes: int) -> int:
    return -(-(chunk_bytes + _HEADER_BYTES) // 64) * 64


class Ring:
    """The memory, as both sides have it.

    Args:
        descriptor: an open file of `ring_bytes`, all of it allocated.
    """

    def __init__(self, descriptor: int, chunk_bytes: int, chunks: int, readers: int) -> None:
        self.chunk_bytes, self.chunks, self.readers = chunk_bytes, chunks, readers
        mapping = mmap.mmap(descriptor, ring_bytes(chunk_bytes, chunks, readers))
        self.memory = memoryview(mapping)
        self._slots = 64 * (2 + 2 * readers)
        self.words = self.memory[: self._slots].cast("I")
        self._address = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()

    def slot(self, count: int) -> memoryview:
        """The slot of chunk number `count`, with its header."""
        start = self._slots + count % self.chunks * _stride(self.chunk_bytes)
        return self.memory[start : start + _HEADER_BYTES + self.chunk_bytes]

    def publish(self, index: int, value: int) -> None:
        """Set a word after all that was written before, and wake who sleeps on it."""
        address = self._address + 4 * index
        if futex.WEAKLY_ORDERED:
            futex.wake(address)
        self.words[index] = value
        futex.wake(address)

    def wait_while(self, index: int, value: int, state: int, peer: Peer, who: str, until: float) -> None:
        """Sleep while the word at `index` is `value`.

        Args:
            state: index of the other side's state word.
            until: of `time.monotonic`.

        Raises:
            RuntimeError: the other side has left or died.
            TimeoutError: it is `until`.
        """
        while self.words[index] == value:
            # Read before the word is read again: what was published before leaving counts.
            gone = "has left the queue" if self.words[state] else "" if peer.alive() else "has died"
            if self.words[index] != value:
                break
            if gone:
                raise RuntimeError(f"{who} (pid {peer.pid}) {gone}")
            remaining = until - time.monotonic()
            if remaining <= 0:
                raise TimeoutError(f"{who} (pid {peer.pid}) did not come in time; its process {peer.condition()}")
            futex.wait(self._address + 4 * index, value, min(_SLICE_S, remaining))
        if futex.WEAKLY_ORDERED:
            futex.wake(self._address + 4 * index)

    def leave(self, state: int, counter: int) -> None:
        """Say that this side takes part no more."""
        self.publish(state, _LEFT)
        futex.wake(self._address + 4 * counter)


class RingWriter:
    """The writing side; `peers` are the readers' processes, `names` what they are called, `readers` their numbers."""

    def __init__(self, ring: Ring, peers: list[Peer], names: list[str], readers: list[int]) -> None:
        self._ring, self._peers, self._names, self._readers = ring, peers, names, readers
        self._count = 0

    def wait_for_room(self, until: float) -> None:
        """Return once a slot is free; raises as `Ring.wait_while`."""
        words, full = self._ring.words, (self._count - self._ring.chunks) & _MASK
        for reader, peer, name in zip(self._readers, self._peers, self._names, strict=True):
            line = _LINE_WORDS * (2 + 2 * reader)
            while words[line] == full:
                self._ring.wait_while(line, full, line + _LINE_WORDS, peer, name, until)

    def write(self, data: bytes | bytearray, until: float) -> None:
        """Write `data` in as many chunks as it takes, waiting for slots."""
        view, size = memoryview(data), self._ring.chunk_bytes
        for start in range(0, max(1, len(view)), size):
            self.wait_for_room(until)
            piece = view[start : start + size]
            slot = self._ring.slot(self._count)
            slot[:_HEADER_BYTES] = _HEADER.pack(len(piece), start == 0, len(view))
            slot[_HEADER_BYTES : _HEADER_BYTES + len(piece)] = piece
            self._count = (self._count + 1) & _MASK
            self._ring.publish(0, self._count)

    def close(self) -> None:
        """Tell the readers, who may still read what was written."""
        self._ring.leave(_LINE_WORDS, 0)
        for peer in self._peers:
            peer.close()


class RingReader:
    """The reading side, reader number `reader`; `peer` is the writer's process."""

    def __init__(self, ring: Ring, reader: int, peer: Peer, name: str) -> None:
        self._ring, self._peer, self._name = ring, peer, name
        self._line = _LINE_WORDS * (2 + 2 * reader)
        self._count = 0

    def wait_for_chunk(self, until: float) -> None:
        """Return once there is a chunk; raises as `Ring.wait_while`."""
        self._ring.wait_while(0, self._count, _LINE_WORDS, self._peer, self._name, until)

    def read(self, until: float) -> bytearray:
        """The next object's bytes.

        Raises:
            ValueError: a chunk's header makes no sense, or the object is larger than is allowed.
        """
        data, total = bytearray(), -1
        while len(data) != total:
            self.wait_for_chunk(until)
            slot = self._ring.slot(self._count)
            # Read once: the memory is the writer's, who might change it after a check.
            size, first, announced = _HEADER.unpack(bytes(slot[:_HEADER_BYTES]))
            if total < 0:
                check_size(announced, f"the object announced by {self._name}")
                total = announced
            due = min(self._ring.chunk_bytes, total - len(data))
            if size != due or first != (not data) or announced != total:
                raise ValueError(
                    f"{self._name} wrote a chunk of {size} bytes of an object of {announced}, "
                    f"where {due} of {total} were due"
                )
            data += slot[_HEADER_BYTES : _HEADER_BYTES + size]
            self._count = (self._count + 1) & _MASK
            self._ring.publish(self._line, self._count)
        return data

    def close(self) -> None:
        """Tell the writer."""
        self._ring.leave(self._line + _LINE_WORDS, self._line)
        self._peer.close()
