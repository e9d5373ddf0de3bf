"""What this process holds that a group may have left behind, compared before and after; and what it held in between."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["held", "resident_within"]

_LISTENS = "0A"
# How /proc lists files without a name: segments and queues.
_UNNAMED = re.compile(r"/dev/shm/.*#\d+ \(deleted\)$")


def held() -> dict[str, int]:
    """Numbers of fvops' segments and queues (open, mapped), its threads, and the process's sockets and children."""
    with open("/proc/self/maps") as maps:
        mapped = sum(bool(_UNNAMED.search(line)) for line in maps)
    open_files = _open_files()
    sockets = {name for name in open_files if name.startswith("socket:[")}
    return {
        "mapped segments": mapped,
        "open segments": sum(bool(_UNNAMED.search(name)) for name in open_files),
        "threads": sum(thread.name.startswith("fvops") for thread in threading.enumerate()),
        "sockets": len(sockets),
        "listening sockets": len(sockets & _listening()),
        "children": _children(),
    }


def _open_files() -> list[str]:
    names = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:  # the one that listed them, or one that another thread has closed meanwhile
            continue
    return names


def _listening() -> set[str]:
    """The TCP sockets of this network namespace that listen, as /proc/self/fd names them."""
    found = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        if os.path.exists(table):  # a kernel without IPv6 has no second one
            with open(table) as lines:
                rows = [line.split() for line in lines][1:]
            found |= {f"socket:[{row[9]}]" for row in rows if row[3] == _LISTENS}
    return found


def _children() -> int:
    count = 0
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/children") as children:
                count += len(children.read().split())
        except FileNotFoundError:  # the thread has ended
            continue
    return count


@contextlib.contextmanager
def resident_within(nbytes: int) -> Iterator[None]:
    """AssertionError if at any moment inside more than `nbytes` more were resident than before: Python's and C++'s."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _resident("VmRSS")
    yield
    peak = _resident("VmHWM")
    assert peak - before < nbytes, f"{peak - before} bytes more than before were resident"


def _resident(what: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{what}:")]
    return int(line.split()[1]) << 10
