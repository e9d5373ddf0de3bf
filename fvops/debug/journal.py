"""The last calls of this process, and those under way: what `dump` prints and what is warned about.

Always kept: an entry costs well under a microsecond, holds no tensor, and the list has an end.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fvops.debug.calls import Member

__all__ = ["Entry", "begin", "finish", "recent", "under_way"]

_KEPT = 64


class Entry:
    """A call: its place in the group's sequence, what it was about, and how it ended.

    Attributes:
        began, ended: ``time.monotonic()``; `ended` is 0.0 while it is under way.
        failed: did it raise?
    """

    __slots__ = ("arguments", "began", "dtype", "ended", "failed", "member", "number", "op", "shapes", "way")

    def __init__(
        self, member: Member, op: str, way: str, number: int, tensors: Sequence[Tensor], arguments: dict[str, Any]
    ) -> None:
        self.member = member
        self.op = op
        self.way = way
        self.number = number
        self.shapes = [tensor.shape for tensor in tensors]
        self.dtype: torch.dtype | None = tensors[0].dtype if tensors else None
        self.arguments = arguments
        self.began = time.monotonic()
        self.ended = 0.0
        self.failed = False

    def __str__(self) -> str:
        shapes = ", ".join(str(tuple(shape)) for shape in self.shapes)
        of = f" of {shapes} {str(self.dtype).removeprefix('torch.')}" if self.shapes else ""
        with_ = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        kind = "call" if self.way == "collective" else f"message {self.way}"
        return f"{self.op} on group {self.member.group!r}, {kind} {self.number}{of}{with_ and f' ({with_})'}"


recent: deque[Entry] = deque(maxlen=_KEPT)
# By the entry's id; calls of other threads may push a slow one out of `recent`.
under_way: dict[int, Entry] = {}


def begin(
    member: Member, op: str, way: str, number: int, tensors: Sequence[Tensor], arguments: dict[str, Any]
) -> Entry:
    """Note that a call begins."""
    entry = Entry(member, op, way, number, tensors, arguments)
    recent.append(entry)
    under_way[id(entry)] = entry
    return entry


def finish(entry: Entry) -> None:
    """Note that it has ended, well or not."""
    entry.ended = time.monotonic()
    del under_way[id(entry)]
