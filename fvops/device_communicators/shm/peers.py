"""Are the other ranks' processes still there? Asked by process, since a dead rank raises no flag.

A pid alone may be reused by a stranger, so it is told apart by its start time, and where the kernel has pidfds the
question is put to one: it refers to that process for ever.
"""

from __future__ import annotations

import os
import select
from dataclasses import dataclass

__all__ = ["Identity", "Peer", "own_identity", "require_same_namespace"]


@dataclass(frozen=True)
class Identity:
    """A process as others of its pid namespace can find it."""

    pid: int
    start: int
    namespace: int


def own_identity() -> Identity:
    """This process. OSError where /proc does not tell."""
    return Identity(os.getpid(), _stat(os.getpid())[1], os.stat("/proc/self/ns/pid").st_ino)


def require_same_namespace(identity: Identity) -> None:
    """RuntimeError if the process is of another pid namespace: its number means another process here, or none."""
    if os.stat("/proc/self/ns/pid").st_ino != identity.namespace:
        raise RuntimeError(f"process {identity.pid} is in another pid namespace, its death could not be seen")


class Peer:
    """The process of another rank.

    Raises:
        RuntimeError: there is no such process in this process's pid namespace.
    """

    def __init__(self, identity: Identity) -> None:
        self.pid = identity.pid
        self._start = identity.start
        self._descriptor = -1
        require_same_namespace(identity)
        if hasattr(os, "pidfd_open"):
            try:
                self._descriptor = os.pidfd_open(self.pid)
            except OSError:
                # An old kernel, or a sandbox that forbids it: /proc tells the same. A process that is gone is found
                # by the next lines.
                self._descriptor = -1
        if not self._listed():
            self.close()
            raise RuntimeError(f"process {self.pid} is not the one that announced itself: it has died meanwhile")

    def alive(self) -> bool:
        """Whether the process has not ended; a zombie has."""
        if self._descriptor >= 0:
            poll = select.poll()
            poll.register(self._descriptor, select.POLLIN)
            return not poll.poll(0)
        return self._listed()

    def condition(self) -> str:
        """What a living process is doing, in words, for an error message."""
        try:
            state = _stat(self.pid)[0]
        except OSError:
            return "has ended"
        return "is stopped" if state in "Tt" else "is alive"

    def close(self) -> None:
        """Give the descriptor back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _listed(self) -> bool:
        try:
            state, start = _stat(self.pid)
        except OSError:
            return False
        return start == self._start and state not in "ZX"


def _stat(pid: int) -> tuple[str, int]:
    """State letter and start time (clock ticks since boot) of a process."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        # The second field is the command in parentheses, which may hold anything.
        fields = file.read().rpartition(b")")[2].split()
    return fields[0].decode(), int(fields[19])
