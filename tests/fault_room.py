"""The faults of shared memory that is full: at a group's creation, and later. It is refused as the kernel refuses."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator

from tests import fault_programs
from tests.fault_programs import DEADLINE_S, LONG, Programs
from tests.fault_table import Fault

__all__ = ["run_without_room"]


def run_without_room(fault: Fault, programs: Programs, guilty: bool, places: int) -> str:
    """What came of it, in words, where the fault is survived; where not, this raises."""
    if fault.act == "full":
        with _full(guilty):
            fault_programs.form(fault, DEADLINE_S)
        return "the group was made"
    if fault.act == "spill":
        with _environment("FVOPS_TRANSPORT", "auto"), _said() as said, _full(guilty):
            fault_programs.form(fault, DEADLINE_S)
        return f"{_verdict(programs, places)}, said {said.count('no room')} times on rank {os.environ['RANK']}"
    fault_programs.form(fault, DEADLINE_S)
    with _full(guilty):
        verdict = _verdict(programs, places)
        results = [programs.other()]
    results.append(programs.other())
    right = all(x.shape == (1, LONG * places * places, 1, 2) and bool((x == 2).all()) for x in results)
    pooled = sum(fault_programs.group._communicator.transport._own.offset_of(x) > 0 for x in results)
    long_ones = f"{'right' if right else 'wrong'} long results, {pooled} of 2 of shared memory"
    return f"{verdict}, {long_ones} on rank {os.environ['RANK']}"


def _verdict(programs: Programs, places: int) -> str:
    """Is the program right, and over what?"""
    y = programs.right()
    right = y.shape == (1, 2 * places * places, 1, 2) and bool((y == 2).all())
    return f"{'right' if right else 'wrong'} results over {fault_programs.group._communicator.transport.name}"


@contextlib.contextmanager
def _full(guilty: bool) -> Iterator[None]:
    """Inside, this rank gets no shared memory, if `guilty`."""
    original = os.posix_fallocate

    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if guilty:
        os.posix_fallocate = refuse
    try:
        yield
    finally:
        os.posix_fallocate = original


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ[name]
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ[name] = before


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self._texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._texts.append(record.getMessage())

    def count(self, words: str) -> int:
        return sum(words in text for text in self._texts)


@contextlib.contextmanager
def _said() -> Iterator[_Said]:
    """What fvops says inside, at INFO and above."""
    logger, handler = logging.getLogger("fvops"), _Said()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
