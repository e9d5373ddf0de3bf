"""Where things lie in a rank's segment: words that signal, a table of destinations, slots, and the pool.

Every rank of a group has the same layout, so an offset means the same in all segments. Each word has one writer and a
cache line of its own. "Source" is the place that writes into the segment.

    line 0        state, culprit                                        written by the owner
    line 1        step, op: the post                                    owner
    line 2        barriers                                              owner
    per source    flag; for each channel pushed, drained and headers    source; `drained` by the owner
    table         (byte offset, bytes) for each source and tensor       owner
    slots         two for each source and channel                       source
    pool          what is leased to results                             owner, and the peers it posted a lease to
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "BARRIERS",
    "CLOSED",
    "COLLECTIVES",
    "CULPRIT",
    "FAILED",
    "MESSAGES",
    "OP",
    "PAGE",
    "SLOTS",
    "STATE",
    "STEP",
    "TABLE_ENTRIES",
    "ChannelLayout",
    "SegmentLayout",
    "round_up",
]

PAGE = 4096
_LINE_WORDS = 16
_LINE_BYTES = 4 * _LINE_WORDS

# Word indices of the owner's lines.
STATE, CULPRIT = 0, 1
STEP, OP = _LINE_WORDS, _LINE_WORDS + 1
BARRIERS = 2 * _LINE_WORDS
_OWNER_LINES = 3

# Values of the state word; 0 is a group at work.
CLOSED, FAILED = 1, 2

COLLECTIVES, MESSAGES = 0, 1
SLOTS = 2
# flag, and (pushed, drained, headers) for two channels
_SOURCE_LINES = 7
TABLE_ENTRIES = 512


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `number`."""
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class ChannelLayout:
    """One channel from one source: word indices of its counters and headers, byte offset of its slots."""

    pushed: int
    drained: int
    headers: int
    slots: int
    slot_bytes: int


@dataclass(frozen=True)
class SegmentLayout:
    """The layout for `places` ranks; sizes in bytes, `slot_bytes` a multiple of 64, `segment_bytes` of a page."""

    places: int
    slot_bytes: int
    segment_bytes: int

    @property
    def message_slot_bytes(self) -> int:
        """A quarter of a collective's slot: messages are rare, and large ones wait for their receiver anyway."""
        return max(64, self.slot_bytes // 4 // 64 * 64)

    @property
    def table(self) -> int:
        """Index of the table's first 64-bit word."""
        return self._source_lines_end // 8

    @property
    def control_bytes(self) -> int:
        """Bytes before the slots."""
        return round_up(self._source_lines_end + 16 * TABLE_ENTRIES, PAGE)

    @property
    def pool_start(self) -> int:
        """Where the pool begins; it ends with the segment."""
        slots = self.places * SLOTS * (self.slot_bytes + self.message_slot_bytes)
        return round_up(self.control_bytes + slots, PAGE)

    @property
    def _source_lines_end(self) -> int:
        return _LINE_BYTES * (_OWNER_LINES + self.places * _SOURCE_LINES)

    def flag(self, source: int) -> int:
        """Word index of the flag that `source` raises."""
        return _LINE_WORDS * (_OWNER_LINES + source * _SOURCE_LINES)

    def channel(self, kind: int, source: int) -> ChannelLayout:
        """The channel of `kind` (COLLECTIVES or MESSAGES) from `source`."""
        first = self.flag(source) + _LINE_WORDS * (1 + 3 * kind)
        collectives = self.places * SLOTS * self.slot_bytes
        size = self.slot_bytes if kind == COLLECTIVES else self.message_slot_bytes
        start = self.control_bytes + (collectives if kind == MESSAGES else 0)
        return ChannelLayout(
            pushed=first,
            drained=first + _LINE_WORDS,
            headers=first + 2 * _LINE_WORDS,
            slots=start + source * SLOTS * size,
            slot_bytes=size,
        )
