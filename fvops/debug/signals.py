"""A signal that makes a rank say what it does, even while its main thread is blocked in C.

A Python signal handler runs only when the main thread comes back to Python. So the signal is caught by faulthandler,
whose handler is C: it writes the threads' stacks into a pipe, and a thread of ours that reads the pipe adds the dump.
It needs the interpreter lock, which waits in gloo, NCCL and shared memory give up.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import sys
import threading
from typing import TextIO

from fvops.debug.report import dump

__all__ = ["install_signal_handler"]

# The stacks come in many small writes: the answer begins when none has come for so long.
_PAUSE_S = 0.1
_lock = threading.Lock()
_writing_ends: dict[int, int] = {}


def install_signal_handler(signum: int = signal.SIGUSR1, file: TextIO | None = None) -> None:
    """On `signum`, write all threads' Python stacks and `dump` to `file`, default ``sys.stderr``.

    A second call for a signal replaces the first. Whatever faulthandler had registered for it is replaced as well.

    Raises:
        AttributeError: this platform has no such signals (Windows).
    """
    reading, writing = os.pipe()
    # The handler must never wait for its reader, which may need what the interrupted thread holds.
    os.set_blocking(writing, False)
    out = sys.stderr if file is None else file
    threading.Thread(target=_answer, args=(reading, out), name="fvops dump on a signal", daemon=True).start()
    with _lock:
        faulthandler.register(signum, file=writing, all_threads=True)
        before = _writing_ends.pop(signum, None)
        _writing_ends[signum] = writing
    if before is not None:
        os.close(before)  # ends its thread


def _answer(reading: int, out: TextIO) -> None:
    while True:
        stacks = os.read(reading, 1 << 16)
        if not stacks:
            os.close(reading)
            return
        while select.select([reading], [], [], _PAUSE_S)[0]:
            more = os.read(reading, 1 << 16)
            if not more:
                break
            stacks += more
        out.write(stacks.decode(errors="replace"))
        dump(out)
