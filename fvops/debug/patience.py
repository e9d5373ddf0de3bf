"""A warning about a call that has lasted long: which one, and whom it waits for. Nothing is given up because of it.

One thread a process looks at the calls under way, while there are groups. A rank that compiles for minutes is alive;
those that wait for it should know what they wait for long before the deadline.
"""

from __future__ import annotations

import threading
import time

from fvops import envs, registry
from fvops.debug.journal import Entry, running
from fvops.debug.report import waits_for
from fvops.logger import init_logger

__all__ = ["start", "stop"]

logger = init_logger(__name__)

_lock = threading.Lock()
_ended: threading.Event | None = None


def start() -> None:
    """Begin to watch, if nobody does."""
    global _ended
    with _lock:
        if _ended is None:
            _ended = threading.Event()
            threading.Thread(target=_watch, args=(_ended,), name="fvops warnings", daemon=True).start()


def stop() -> None:
    """End watching; the thread ends by itself."""
    global _ended
    with _lock:
        if _ended is not None:
            _ended.set()
            _ended = None


def _watch(ended: threading.Event) -> None:
    # By the call's number: after how many seconds it is warned about next.
    due: dict[int, float] = {}
    while not ended.wait(min(5.0, envs.FVOPS_WARN_AFTER_S / 4)):
        calls = running()
        due = {key: seconds for key, seconds in due.items() if key in calls}
        for key, entry in calls.items():
            seconds = time.monotonic() - entry.began
            if seconds >= due.setdefault(key, envs.FVOPS_WARN_AFTER_S):
                due[key] = 2 * seconds
                _warn(entry, seconds)


def _warn(entry: Entry, seconds: float) -> None:
    who = waits_for(entry) or _ask(entry)
    logger.warning(
        "rank %d waits since %.0f s in %s, deadline %g s; %s. A rank that compiles takes its time; "
        "fvops.debug.dump() and install_signal_handler() tell what each rank does",
        entry.member.ranks[entry.member.place],
        seconds,
        entry,
        entry.member.timeout_s,
        who,
    )


def _ask(entry: Entry) -> str:
    """Whom it waits for, told by who has not waited as long: each rank that warns leaves a mark in the store."""
    communicator = registry.find(entry.member.group)
    if communicator is None or communicator.member is not entry.member:
        return "its group was destroyed meanwhile"
    # A message is counted by both of its ends, which are the only ones that can be in it.
    expected = range(len(entry.member.ranks)) if entry.way == "collective" else map(int, entry.way.split("-"))
    return communicator.roll_call.waiting(f"{entry.way} {entry.number}", list(expected), entry.member.ranks)
