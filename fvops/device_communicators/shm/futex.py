"""Sleeping on a 32-bit word of shared memory until another process changes it: the Linux futex, through ctypes.

The standard library has no shared-memory wait of this cost: a wake is one system call of about a microsecond, and so
is a wait whose word has changed already. `docs/one-sided.md` argues why a store and a wake need no more than this.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from typing import Any

__all__ = ["WEAKLY_ORDERED", "unsupported", "wait", "wake"]

_SYSCALLS = {"x86_64": 202, "aarch64": 98}
_WAIT, _WAKE, _EVERYONE = 0, 1, 2**31 - 1
# What a wait returns with when there is nothing wrong: the word differs, the time is over, a signal came.
_USUAL = (errno.EAGAIN, errno.ETIMEDOUT, errno.EINTR)

# On x86 stores become visible in program order, and loads are not reordered with loads.
WEAKLY_ORDERED = platform.machine() != "x86_64"


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_number = _SYSCALLS.get(platform.machine(), 0) if sys.platform == "linux" else 0


def _syscall(library: Any) -> Any:
    function = library.syscall
    function.restype = ctypes.c_long
    function.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p]
    return function


if _number:
    # A wake never blocks, so it keeps the GIL: giving it up can cost five milliseconds where threads compete for it.
    _wake_call = _syscall(ctypes.PyDLL(None))
    _wait_call = _syscall(ctypes.CDLL(None, use_errno=True))


def unsupported() -> str:
    """Why this machine has no futex that we know how to call; empty where it has one."""
    if not _number or ctypes.sizeof(ctypes.c_long) != 8:
        return f"no futex call for {sys.platform} on {platform.machine()}"
    word = ctypes.c_uint32(0)
    try:
        wake(ctypes.addressof(word))
        wait(ctypes.addressof(word), 1, 0.0)
    except OSError as error:
        return f"the futex system call is not allowed here ({error})"
    return ""


def wake(address: int) -> None:
    """Wake all who sleep on the word at `address`. A full memory barrier. OSError when the kernel refuses."""
    if _wake_call(_number, address, _WAKE, _EVERYONE, None) < 0:
        raise OSError(f"futex wake at {address:#x} failed")


def wait(address: int, expected: int, seconds: float) -> None:
    """Sleep while the word at `address` is `expected`, at most `seconds`; may return earlier. OSError as `wake`."""
    whole = int(seconds)
    time = _Timespec(whole, int((seconds - whole) * 1e9))
    if _wait_call(_number, address, _WAIT, expected, ctypes.addressof(time)) < 0:
        number = ctypes.get_errno()
        if number not in _USUAL:
            raise OSError(number, f"futex wait at {address:#x}: {os.strerror(number)}")
