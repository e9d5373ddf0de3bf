"""The last calls of this process, and those under way: what `dump` prints and what is warned about.

Always kept: an entry costs about a microsecond, holds no tensor, and the list has an end.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fvops.debug.calls import Member

__all__ = ["Entry", "begin", "finish", "last_calls", "running"]

_KEPT = 64
_ENDED, _FAILED = 8, 9


@dataclass(frozen=True)
class Entry:
    """A call: its place in the group's sequence, what it was about, and how it ended.

    Attributes:
        began, ended: ``time.monotonic()``; `ended` is 0.0 while it is under way.
        failed: did it raise?
    """

    member: Member
    op: str
    way: str
    number: int
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype | None
    arguments: dict[str, Any]
    began: float
    ended: float
    failed: bool

    def __str__(self) -> str:
        shapes = ", ".join(str(tuple(shape)) for shape in self.shapes)
        of = f" of {shapes} {str(self.dtype).removeprefix('torch.')}" if self.shapes else ""
        with_ = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        kind = "call" if self.way == "collective" else f"message {self.way}"
        return f"{self.op} on group {self.member.group!r}, {kind} {self.number}{of}{with_ and f' ({with_})'}"


# The fields of an `Entry`, in order: making a list costs a third of making an object, on the path of every call.
_recent: deque[list[Any]] = deque(maxlen=_KEPT)
# By the list's id; calls of other threads may push a slow one out of `_recent`.
_under_way: dict[int, list[Any]] = {}
_monotonic = time.monotonic


def begin(
    member: Member,
    op: str,
    way: str,
    number: int,
    tensors: Tensor | Sequence[Tensor] | None,
    arguments: dict[str, Any],
) -> list[Any]:
    """Note that a call begins; `finish` wants what this returns, and ``Entry(*...)`` takes it."""
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype | None
    if isinstance(tensors, Tensor):
        shapes, dtype = (tensors.shape,), tensors.dtype
    else:
        shapes = tuple([tensor.shape for tensor in tensors or ()])
        dtype = tensors[0].dtype if tensors else None
    noted = [member, op, way, number, shapes, dtype, arguments, _monotonic(), 0.0, False]
    _recent.append(noted)
    _under_way[id(noted)] = noted
    return noted


def finish(noted: list[Any], failed: bool = False) -> None:
    """Note that it has ended, well or not."""
    noted[_FAILED] = failed
    noted[_ENDED] = _monotonic()
    del _under_way[id(noted)]


def last_calls() -> list[Entry]:
    """The last calls that have ended, the newest last."""
    return [Entry(*noted) for noted in list(_recent) if noted[_ENDED]]


def running() -> dict[int, Entry]:
    """The calls under way, by a number that is theirs until they end."""
    return {key: Entry(*noted) for key, noted in list(_under_way.items())}
