"""Shared memory that never has a name: a process killed at any moment leaves nothing behind.

The file is made with O_TMPFILE. Another process of the same user opens it through its maker's descriptor,
``/proc/<pid>/fd/<number>``, for as long as the maker holds that open. So sharers are of one node and pid namespace,
which their liveness checks (`peers`) ask for anyway.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from fvops.device_communicators.shm.peers import Identity, own_identity, require_same_namespace

__all__ = ["Address", "address_of", "create", "open_other"]

_BOOT_ID = "/proc/sys/kernel/random/boot_id"


@dataclass(frozen=True)
class Address:
    """Where another process finds a file; made of numbers and strings, to be told over a wire."""

    boot_id: str
    folder: str
    pid: int
    start: int
    namespace: int
    descriptor: int
    inode: int

    @property
    def maker(self) -> Identity:
        """The process that holds the file open."""
        return Identity(self.pid, self.start, self.namespace)


def create(folder: str) -> int:
    """A descriptor of a new empty file of this user alone (mode 0600) in `folder`, a tmpfs. OSError."""
    return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)


def address_of(descriptor: int, folder: str) -> Address:
    """The address of a file of this process. OSError where /proc does not tell."""
    maker = own_identity()
    inode = os.fstat(descriptor).st_ino
    return Address(_boot_id(), folder, maker.pid, maker.start, maker.namespace, descriptor, inode)


def open_other(address: Address, folder: str, nbytes: int) -> int:
    """A descriptor of another process' file of `nbytes`.

    Args:
        folder: where this process would make such a file; elsewhere is another node.

    Raises:
        FileNotFoundError: it was made on another node.
        OSError: the process is gone or not to be looked into, or this is not the file that was announced.
        RuntimeError: the process is of another pid namespace.
    """
    if (address.boot_id, address.folder) != (_boot_id(), folder):
        raise FileNotFoundError(f"process {address.pid} is on another node")
    require_same_namespace(address.maker)
    path = f"/proc/{address.pid:d}/fd/{address.descriptor:d}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ProcessLookupError(f"process {address.pid} has ended or closed its file") from error
    status: Any = os.fstat(descriptor)
    # Nothing but the file that was announced: a number may stand for another process by now, and a file that is
    # shorter would kill this process when it touches the end.
    found = (status.st_ino, status.st_nlink, status.st_uid, status.st_size)
    if found != (address.inode, 0, os.geteuid(), nbytes):
        os.close(descriptor)
        raise PermissionError(f"{path} is not the file that was announced")
    return descriptor


def _boot_id() -> str:
    try:
        with open(_BOOT_ID) as file:
            return file.read().strip()
    except OSError:  # sandboxes hide it; nodes then differ in their processes' start times and files' numbers
        return ""
