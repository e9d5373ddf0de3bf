"""What can go wrong, as data: each fault with what its culprit does and what the other ranks must be told.

The culprit is the last rank, but for the store's server and the queue's writer, who are the first.
`tests/fault_run.py` carries one out, `tests/test_faults.py` runs all, and `tools/reliability_matrix.py` makes
docs/reliability.md of the results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["FAULTS", "MODES", "QUICK", "TRANSPORTS", "WORLDS", "Cell", "Fault", "cells"]

WORLDS = (2, 4)
MODES = ("eager", "compiled")
TRANSPORTS = ("shm", "process_group", "nccl", "hccl")


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        name: as in the matrix.
        act: what the culprit does: "kill" or "stop" (itself), "raise" (an exception ends its program, which cleans up),
            "late", "destroy" (its group), "full" (there is no shared memory for its group), "writer" or "reader" (of a
            message queue: killed), "unread" (it reads nothing from one), or a call that differs.
        when: before, during or after a collective.
        says: a regular expression that every other rank's error must match; ``{culprit}`` is its place.
        checked: the ranks run under `check_collectives`, which promises the same words on every transport.
        transports, modes: the cells that there are.
    """

    name: str
    act: str
    when: str
    says: str
    checked: bool = False
    transports: tuple[str, ...] = TRANSPORTS
    modes: tuple[str, ...] = MODES

    @property
    def dies(self) -> bool:
        """Does the culprit's process end?"""
        return self.act in ("kill", "stop", "server", "writer", "reader")

    @property
    def queued(self) -> bool:
        """Do the ranks broadcast objects over a message queue, instead of running collectives?"""
        return self.act in ("writer", "reader", "unread")

    def culprit(self, world_size: int) -> int:
        """The rank that commits or suffers it."""
        return 0 if self.act in ("server", "writer") else world_size - 1


_NAMED = r"fvops\.\w+ on group 'brief:0'.* failed .*place {culprit}\b"
# A rank that tears down its process groups may leave no time for the roll call, nor a store to call it in.
_TOLD = r"fvops\.\w+ on group 'brief:0'.* failed "
_TABLE = (
    r"was not issued, the ranks do not agree: (the ranks' {what} differ|rank \d+ was refused)(.|\n)*\n  {culprit} +\|"
)
# The writer knows who does not read; it leaves the queue, and that is what the other readers learn, unless their own
# deadlines pass in that moment.
_QUEUE = (
    _TOLD + r".*(place {culprit}, a reader, .* %s|place 0, the writer, .* (has left the queue|did not come in time))"
)
_ONE_QUEUE: Any = {"transports": ("shm",), "modes": ("eager",)}

FAULTS = [
    *(Fault(f"SIGKILL {when} a collective", "kill", when, _NAMED) for when in ("before", "during", "after")),
    *(Fault(f"SIGSTOP {when} a collective", "stop", when, _NAMED) for when in ("before", "during", "after")),
    *(Fault(f"exception {when} a collective", "raise", when, _TOLD) for when in ("before", "during", "after")),
    Fault("late by more than the deadline", "late", "before", _NAMED),
    Fault("other shapes", "shapes", "before", _TABLE.replace("{what}", "shapes"), checked=True),
    Fault("other dtypes", "dtypes", "before", _TABLE.replace("{what}", "dtypes"), checked=True),
    Fault("another op", "ops", "before", _TABLE.replace("{what}", "ops"), checked=True),
    Fault("another order", "order", "before", _TABLE.replace("{what}", "ops"), checked=True),
    Fault("another group", "groups", "before", r"wait for one another|was refused a call", checked=True),
    Fault("destroy while a peer is inside a call", "destroy", "before", _TOLD),
    Fault(
        "/dev/shm full",
        "full",
        "before",
        r"FVOPS_TRANSPORT=shm, but place {culprit}: .*no room",
        transports=("shm",),
        modes=("eager",),
    ),
    Fault("the store's server gone", "server", "before", _TOLD),
    Fault("the message queue full", "unread", "before", _QUEUE % "did not come in time", **_ONE_QUEUE),
    Fault(
        "the message queue's writer dead",
        "writer",
        "during",
        _TOLD + r".*place 0, the writer, .* has died",
        **_ONE_QUEUE,
    ),
    Fault("a reader of the message queue dead", "reader", "during", _QUEUE % "has died", **_ONE_QUEUE),
]


@dataclass(frozen=True)
class Cell:
    """One fault in one configuration."""

    fault: Fault
    world_size: int
    mode: str
    transport: str

    def __str__(self) -> str:
        return f"{self.fault.name}, {self.world_size} ranks, {self.mode}, {self.transport}"


def cells() -> list[Cell]:
    """All cells, in the matrix's order."""
    return [
        Cell(fault, world_size, mode, transport)
        for fault in FAULTS
        for world_size in WORLDS
        for mode in fault.modes
        for transport in fault.transports
    ]


def _quick() -> set[str]:
    """Every ninth cell: eight columns and as many rows for a fault make that a diagonal through the matrix, which meets
    most faults twice, at both world sizes and over two transports. Of a fault that it misses, the first."""
    everything = cells()
    chosen = everything[::9]
    met = {cell.fault.name for cell in chosen}
    for cell in everything:
        if cell.fault.name not in met:
            chosen.append(cell)
            met.add(cell.fault.name)
    return {str(cell) for cell in chosen}


# What `make test` runs.
QUICK = _quick()
