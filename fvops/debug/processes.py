"""Has another rank's process ended? Only told of a process on this machine; of others nothing is known."""

from __future__ import annotations

import functools
import os
import socket
from dataclasses import dataclass

__all__ = ["Process", "this_process"]


@dataclass(frozen=True)
class Process:
    """A process and the machine and pid namespace that it is in; `start` (clock ticks) tells re-used pids apart."""

    pid: int
    start: str
    home: str

    def ended(self) -> bool:
        """Has it ended for certain?"""
        return bool(self.home) and self.home == _home() and _start(self.pid) != self.start


def this_process() -> Process:
    """The calling process."""
    return _known(os.getpid())


@functools.cache
def _known(pid: int) -> Process:
    return Process(pid, _start(pid), _home())


def _home() -> str:
    """Names this machine, this boot and this pid namespace; empty where /proc does not tell (macOS)."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _start(pid: int) -> str:
    """When `pid` started; empty for one that has ended (a zombie has)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The second field is the command in parentheses, which may hold anything.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in b"ZX" else fields[19].decode()
