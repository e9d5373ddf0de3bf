"""Can a rank that has not come still come? Told from what every rank put up last, whatever group it is in.

A rank that waits, waits for all who have not come to its call. So it is stuck if, going from who waits to who is waited
for, one gets to a rank that will post no more (it has left the group, exited or died, or its own check failed), or back
to where one has been. A rank that is between two calls, computing or compiling, waits for nobody: nothing follows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from fvops.debug.board import Board
from fvops.debug.fingerprint import Fingerprint
from fvops.debug.processes import Process

__all__ = ["Notice", "left_key", "notice_key", "seen_last", "stuck"]

_CIRCLE = "the ranks wait for one another: "


def notice_key(rank: int) -> str:
    """Where global rank `rank` puts up its last notice."""
    return f"last/{rank}"


def left_key(life: int, place: int) -> str:
    """Where `place` of the group of that `life` says that it has left it."""
    return f"left/{life}/{place}"


@dataclass(frozen=True)
class Notice:
    """What a rank put up last.

    Attributes:
        print_: the call that it came to.
        life: the group's.
        call: where that call is announced: place p of the group does it under ``call/p``.
        awaited: the places that it waits for, by global rank.
        process: the rank's process.
        over: why it posts no more; empty while it may.
        failed: it posts no more because its check of that call failed.
    """

    print_: Fingerprint
    life: int
    call: str
    awaited: dict[int, int]
    process: Process
    over: str = ""
    failed: bool = False

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str, rank: int) -> Notice:
        """What global rank `rank` put up; RuntimeError for what no `encode` has written."""
        try:
            raw = json.loads(text)
            raw["print_"] = Fingerprint.decode(json.dumps(raw["print_"]))
            raw["awaited"] = {int(other): place for other, place in raw["awaited"].items()}
            raw["process"] = Process(**raw["process"])
            notice = cls(**raw)
        except (AttributeError, KeyError, RecursionError, RuntimeError, TypeError, ValueError) as error:
            raise RuntimeError(f"{_notice_of(rank)}: {type(error).__name__}: {error}") from error
        kinds = (
            (int, [notice.life, notice.process.pid, *notice.awaited.values()]),
            (str, [notice.call, notice.over, notice.process.start, notice.process.home]),
            (bool, [notice.failed]),
        )
        for kind, values in kinds:
            for value in values:
                if type(value) is not kind:
                    raise RuntimeError(f"{_notice_of(rank)}: {str(value)[:100]!r} where a {kind.__name__} was due")
        return notice

    def has_come(self, board: Board, rank: int) -> bool:
        """Has `rank`, one of `awaited`, announced this call?"""
        return board.holds([f"{self.call}/{self.awaited[rank]}"])


def seen_last(board: Board, rank: int) -> str:
    """What a rank that is in no call announced last, in words."""
    text = board.read(notice_key(rank))
    if text is None:
        return "has announced nothing: is checking on there too?"
    print_ = Notice.decode(text, rank).print_
    return f"its last call was {print_.op}, call {print_.number} of group {print_.group!r}, from {print_.where}"


def _notice_of(rank: int) -> str:
    return f"the notice that global rank {rank} put up for check_collectives (key {notice_key(rank)!r}) is unreadable"


def stuck(board: Board, me: int, own: Notice) -> tuple[str, dict[int, Fingerprint | str]]:
    """Why the call of `own` will never come about, and what the ranks concerned were about to do; ("", {}) if it may.

    Notices are read twice, with the looks at who came between: what stayed the same held at one moment.
    """
    first = _reachable(board, me, own)
    reason, ranks = _search(board, me, first)
    if not reason:
        return "", {}
    again = _reachable(board, me, own)
    if any(first.get(rank) != again.get(rank) for rank in ranks):
        return "", {}
    rows: dict[int, Fingerprint | str] = {}
    for rank in ranks:
        notice = first[rank]
        gone = notice is None or (rank == ranks[-1] and not notice.failed and not reason.startswith(_CIRCLE))
        rows[rank] = seen_last(board, rank) if notice is None or gone else notice.print_
    return reason, rows


def _reachable(board: Board, me: int, own: Notice) -> dict[int, Notice | None]:
    """The last notices of all to whom waiting leads from `me`."""
    found: dict[int, Notice | None] = {me: own}
    ahead = list(own.awaited)
    while ahead:
        rank = ahead.pop()
        if rank in found:
            continue
        text = board.read(notice_key(rank))
        found[rank] = notice = None if text is None else Notice.decode(text, rank)
        if notice is not None:
            ahead.extend(notice.awaited)
    return found


def _search(board: Board, me: int, notices: dict[int, Notice | None]) -> tuple[str, list[int]]:
    """Depth first from `me` along the edges "waits for one who has not come"; the reason and the ranks on the way."""
    path: list[int] = []

    def visit(rank: int) -> str:
        notice = notices[rank]
        if rank in path:
            return _circle(path[path.index(rank) :], notices)
        if notice is None:
            return ""
        path.append(rank)
        for other in notice.awaited:
            if notice.has_come(board, other):
                continue
            reason = _gone(board, notice, other, notices[other]) or visit(other)
            if reason:
                if other not in path:
                    path.append(other)
                return reason
        path.pop()
        return ""

    return visit(me), path


def _gone(board: Board, waiting: Notice, rank: int, notice: Notice | None) -> str:
    """Why `rank` will not come to the call of `waiting`, whatever it waits for itself."""
    left = board.read(left_key(waiting.life, waiting.awaited[rank]))
    if left is not None:
        return f"rank {rank} {left}"
    if notice is None:
        return ""
    if notice.over:
        return f"rank {rank} {notice.over}"
    if notice.process.ended():
        return f"rank {rank} (pid {notice.process.pid}) has died"
    return ""


def _circle(ranks: Sequence[int], notices: dict[int, Notice | None]) -> str:
    calls = []
    for rank in ranks:
        notice = notices[rank]
        if notice is not None:
            calls.append(f"rank {rank} waits in {notice.print_.op} on group {notice.print_.group!r}")
    return _CIRCLE + ", ".join(calls)
