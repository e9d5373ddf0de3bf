"""A first-in-first-out pipe of pieces from one rank to another: two slots in the receiver's segment, and credits.

It carries what has no place of its own to be pushed to: terms of reductions, messages, small parts, and results that
did not fit into the pool. The sender counts pieces pushed, the receiver pieces drained; a slot is free when no more
than one of the pushed pieces is not yet drained. Neither side needs to know what the other is about to do.
"""

from __future__ import annotations

from array import array

from torch import Tensor

from fvops.device_communicators.shm.op_codes import name
from fvops.device_communicators.shm.segment_layout import SLOTS
from fvops.device_communicators.shm.watch import PeerError, Watch

__all__ = ["Inlet", "Outlet", "mismatch", "pieces"]

_MASK = (1 << 32) - 1


def pieces(x: Tensor, slot_bytes: int) -> list[Tensor]:
    """Views of `x` in order, none above `slot_bytes`, cut by its shape alone: ranks with other strides cut alike."""
    nbytes = x.numel() * x.element_size()
    if nbytes <= slot_bytes:
        return [x] if nbytes else []
    row_bytes = nbytes // x.size(0)
    if row_bytes > slot_bytes:
        return [piece for row in x.unbind(0) for piece in pieces(row, slot_bytes)]
    return list(x.split(slot_bytes // row_bytes))


class _End:
    """What both ends know: the segment that holds the slots, the counters, and who is at the other end."""

    def __init__(
        self, watch: Watch, kind: int, source: int, destination: int, counts: memoryview | None, at: int
    ) -> None:
        self._watch = watch
        self._segment = watch.segments[destination]
        self._layout = self._segment.layout.channel(kind, source)
        self._counts = memoryview(array("I", [0] * (at + 1))) if counts is None else counts
        self._at = at

    @property
    def _count(self) -> int:
        """Pieces that went through this end."""
        return self._counts[self._at]

    @_count.setter
    def _count(self, count: int) -> None:
        self._counts[self._at] = count & _MASK

    @property
    def slot_bytes(self) -> int:
        """Bytes that a piece may have."""
        return self._layout.slot_bytes

    def _slot(self, like: Tensor) -> Tensor:
        """The current slot as a contiguous tensor of the shape and dtype of `like`."""
        offset = self._layout.slots + self._count % SLOTS * self._layout.slot_bytes
        return self._segment.tensor(offset, like.shape, None, like.dtype)

    def _header(self) -> int:
        """Word index of the current slot's header: op, -, bytes (64 bits)."""
        return self._layout.headers + self._count % SLOTS * 4


class Outlet(_End):
    """The sending end, at this rank, of a channel to `place`; counts in ``counts[place]`` if given."""

    def __init__(self, watch: Watch, kind: int, place: int, counts: memoryview | None = None) -> None:
        super().__init__(watch, kind, watch.me, place, counts, place)
        self._place = place

    def free_slots(self) -> int:
        """How many pieces can be pushed without waiting."""
        return SLOTS - ((self._count - self._segment.words[self._layout.drained]) & _MASK)

    def await_slot(self) -> None:
        """Wait until the next slot is free."""
        self._watch.reach(self._segment, self._layout.drained, (self._count + 1 - SLOTS) & _MASK, self._place)

    def push(self, op: int, x: Tensor, nbytes: int | None = None) -> None:
        """Copy `x`, at most `slot_bytes`, into the next slot, waiting for it to be free.

        Args:
            op: number of the collective, checked by the receiver.
            nbytes: what the receiver must expect, checked there; default the bytes of `x`.
        """
        layout, segment = self._layout, self._segment
        self.await_slot()
        if x.numel():
            self._slot(x).copy_(x)
        header = self._header()
        segment.words[header] = op
        segment.quads[header // 2 + 1] = x.numel() * x.element_size() if nbytes is None else nbytes
        self._count += 1
        segment.publish(layout.pushed, self._count)


class Inlet(_End):
    """The receiving end, at this rank, of a channel from `place`; counts in ``counts[place]`` if given."""

    def __init__(self, watch: Watch, kind: int, place: int, counts: memoryview | None = None) -> None:
        super().__init__(watch, kind, place, watch.me, counts, place)
        self._place = place

    def await_piece(self) -> None:
        """Wait until the next piece is there."""
        self._watch.reach(self._segment, self._layout.pushed, (self._count + 1) & _MASK, self._place)

    def check(self, op: int, nbytes: int) -> None:
        """PeerError unless the next piece, which is there, belongs to call `op` and announces `nbytes`."""
        header = self._header()
        found = self._segment.words[header], self._segment.quads[header // 2 + 1]
        if found != (op, nbytes):
            raise mismatch(self._place, found, (op, nbytes))

    def peek(self, op: int, like: Tensor, nbytes: int | None = None) -> Tensor:
        """The next piece, as a tensor in its slot with the shape and dtype of `like`; valid until `release`.

        Raises:
            PeerError: the peer is gone, or the piece belongs to another collective or has another size.
        """
        self.await_piece()
        self.check(op, like.numel() * like.element_size() if nbytes is None else nbytes)
        return self._slot(like)

    def release(self) -> None:
        """Give the slot of the last `peek` back to the sender."""
        self._count += 1
        self._segment.publish(self._layout.drained, self._count)

    def pull(self, op: int, x: Tensor, nbytes: int | None = None) -> None:
        """Copy the next piece into `x`."""
        piece = self.peek(op, x, nbytes)
        if x.numel():
            x.copy_(piece)
        self.release()


def mismatch(place: int, found: tuple[int, int], expected: tuple[int, int]) -> PeerError:
    """The error of a rank that is told of another (op, bytes) than its own; the numbers are `op_codes.OPS`'."""
    ours, theirs = (f"{name(op)} with parts of {nbytes} bytes" for op, nbytes in (expected, found))
    return PeerError(f"place {place} called {theirs}, this rank {ours}: every rank must issue the same call", [place])
