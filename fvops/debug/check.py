"""Comparing calls between ranks before they run: `check_collectives` and ``FVOPS_DEBUG=collectives``.

Each rank announces its call on the board, waits for the others' announcements of the same call of the group, and
compares. All see the same announcements, so all raise or none does. `docs/debugging.md` has the whole protocol.
"""

from __future__ import annotations

import atexit
import threading
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch.distributed as dist

from fvops import envs
from fvops.checks import where
from fvops.debug.board import Board, pauses
from fvops.debug.calls import Call, Member, observers
from fvops.debug.fingerprint import Fingerprint, difference, difference_of_message, of_call, table
from fvops.debug.processes import this_process
from fvops.debug.standstill import Notice, left_key, notice_key, seen_last, stuck
from fvops.logger import init_logger

__all__ = ["Checking", "MismatchError", "check_collectives", "compare_objects", "follow_variable", "leave"]

logger = init_logger(__name__)

# How collectives are counted; messages by the places of both ends.
_COLLECTIVE = "collective"
# A wait looks at what the other ranks do, at first after so many seconds.
_LOOK_AFTER_S, _LONGEST_LOOK_S = 0.3, 5.0


class MismatchError(RuntimeError):
    """The ranks of a group were about to do different things, or one of them will not come."""


class Checking:
    """Checking is on from its creation until `stop`, or the end of its ``with`` block."""

    def __init__(self) -> None:
        self._on = True
        with _lock:
            _open.append(self)
            if len(_open) == 1:
                # First: a call that does not run is not recorded.
                observers.insert(0, _check)

    def stop(self) -> None:
        """Compare no more, unless somebody else has asked for it too. Safe to call twice."""
        with _lock:
            if self._on:
                self._on = False
                _open.remove(self)
                if not _open:
                    observers.remove(_check)

    def __enter__(self) -> Checking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def check_collectives() -> Checking:
    """From here on, or inside ``with``, ranks compare op, shapes, dtype and arguments before each collective.

    Every rank must turn it on, and off, between the same two calls. A call on which ranks differ, or to which one will
    not come, is not issued: every rank that came raises RuntimeError with a table of what each was about to do.
    """
    return Checking()


def compare_objects(member: Member, op: str, arguments: dict[str, Any], way: str, number: int) -> None:
    """Compare a call that moves objects, beside any transport, like a collective, if checking is on.

    Raises:
        MismatchError: the ranks do not agree.
    """
    if _open:
        _check(Call(member, op, (), arguments, way, number))


def follow_variable() -> None:
    """Turn checking on, or off again, as ``FVOPS_DEBUG`` says now; called when a group is made."""
    global _for_variable
    asked = "collectives" in envs.FVOPS_DEBUG
    if asked and _for_variable is None:
        _for_variable = Checking()
    elif not asked and _for_variable is not None:
        _for_variable.stop()
        _for_variable = None


def leave(member: Member) -> None:
    """Tell ranks that check that this one has destroyed its group."""
    if _open and dist.is_initialized() and len(member.ranks) > 1:
        try:
            Board().post(left_key(member.life, member.place), f"has destroyed group {member.group!r}")
        except RuntimeError as error:
            # A group must be destroyed even so; without a store nobody compares calls any more.
            logger.warning("the other ranks cannot be told that group %r is destroyed: %s", member.group, error)
        with _lock:
            for key in [key for key in _counts if key[0] == member.life]:
                del _counts[key]
            _firsts.pop(member.life, None)


_lock = threading.Lock()
_open: list[Checking] = []
# By the group's life and the way: how many calls were compared.
_counts: dict[tuple[int, str], int] = {}
# By the group's life: at which call the ranks' callers first differed. No error, but where to look after one.
_firsts: dict[int, str] = {}
_exit_is_announced = False
_for_variable: Checking | None = None


def _check(call: Call) -> None:
    member = call.member
    if len(member.ranks) == 1:
        return
    board, print_ = Board(), of_call(call)
    with _lock:
        number = _counts[member.life, call.way] = _counts.get((member.life, call.way), 0) + 1
    _announce_exit()
    path = f"call/{member.life}/{call.way}"
    # Of a message: `send`, `send_object`, `send_tensor_dict` and their counterparts.
    sends = call.way != _COLLECTIVE and call.op.startswith("send")
    source = call.arguments["src"] if call.way != _COLLECTIVE and not sends else None
    awaited = [] if sends else [source] if source is not None else _others(member)
    ranks = {member.ranks[place]: place for place in awaited}
    notice = Notice(print_, member.life, f"{path}/{number}", ranks, this_process())
    # The notice before the announcement: who misses that and then reads this must not find an older one here.
    board.post(notice_key(member.ranks[member.place]), notice.encode())
    if source is None:
        board.post(f"{path}/{number}/{member.place}", print_.encode())
    keys = [f"{path}/{number}/{place}" for place in awaited]
    _await(board, call, notice, keys)
    prints = dict(zip(awaited, map(Fingerprint.decode, board.read_all(keys)), strict=True)) | {member.place: print_}
    if source is not None:
        reason = difference_of_message(prints[source], print_)
    else:
        reason = difference([prints[place] for place in sorted(prints)])
    if reason:
        _refuse(board, call, notice, reason, {member.ranks[place]: other for place, other in prints.items()})
    if call.way == _COLLECTIVE:
        _compare_callers(member, [prints[place] for place in sorted(prints)])
    if number > 1 and not sends:
        # Whoever had to read the announcement of the call before has come to this one; nobody's notice names it now.
        board.take_down(f"{path}/{number - 1}/{member.place if source is None else source}")


def _others(member: Member) -> list[int]:
    return [place for place in range(len(member.ranks)) if place != member.place]


def _await(board: Board, call: Call, notice: Notice, keys: list[str]) -> None:
    """Return when all of `keys` are there; raise when that cannot happen any more, or the deadline has passed."""
    if not keys:
        return
    look_at = _LOOK_AFTER_S
    for waited in pauses():
        if board.holds(keys):
            return
        reason = ""
        rows: dict[int, Fingerprint | str] = {}
        if waited >= call.member.timeout_s:
            late = [rank for rank in notice.awaited if not notice.has_come(board, rank)]
            rows = {rank: seen_last(board, rank) for rank in late}
            reason = f"rank {', '.join(map(str, late))} did not come within {call.member.timeout_s:g} s"
        elif waited >= look_at:
            look_at = waited + min(waited, _LONGEST_LOOK_S)
            reason, rows = stuck(board, call.member.ranks[call.member.place], notice)
        if reason:
            _refuse(board, call, notice, reason, _who_came(board, call, notice) | rows)


def _who_came(board: Board, call: Call, notice: Notice) -> dict[int, Fingerprint | str]:
    """The announcements of this call, by global rank, this rank's own among them."""
    rows: dict[int, Fingerprint | str] = {call.member.ranks[call.member.place]: notice.print_}
    for rank, place in notice.awaited.items():
        text = board.read(f"{notice.call}/{place}")
        if text is not None:
            rows[rank] = Fingerprint.decode(text)
    return rows


def _refuse(board: Board, call: Call, notice: Notice, reason: str, rows: dict[int, Fingerprint | str]) -> None:
    """Raise, and let who waits for this rank know that it does."""
    member = call.member
    failed = replace(notice, over="was refused a call, and comes to no other", failed=True)
    board.post(notice_key(member.ranks[member.place]), failed.encode())
    raise MismatchError(
        f"{where(call.op, member.group)} was not issued, the ranks do not agree: {reason}.\n{table(rows)}"
        + _firsts.get(member.life, "")
    )


def _compare_callers(member: Member, prints: list[Fingerprint]) -> None:
    places = [print_.where for print_ in prints]
    if member.life not in _firsts and len(set(places)) > 1:
        listed = ", ".join(f"rank {rank} at {place}" for rank, place in zip(member.ranks, places, strict=True))
        _firsts[member.life] = (
            f"\n  Before that, {prints[0].op}, call {prints[0].number} of this group, agreed, but came from different "
            f"lines, the first that did: {listed}"
        )


def _announce_exit() -> None:
    global _exit_is_announced
    if not _exit_is_announced:
        _exit_is_announced = True
        atexit.register(_say_that_we_exit)


def _say_that_we_exit() -> None:
    if not dist.is_initialized():
        return  # every group was destroyed, which its other ranks were told
    board, key = Board(), notice_key(dist.get_rank())
    try:
        text = board.read(key)
        if text is not None:
            board.post(key, replace(Notice.decode(text, dist.get_rank()), awaited={}, over="has exited").encode())
    except RuntimeError as error:
        logger.warning("the other ranks cannot be told that this one exits: %s", error)
