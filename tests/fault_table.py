"""What can go wrong, as data: each fault with what its culprit does and what the other ranks must be told.

The culprit is the last rank, but for who has the store's server and the queue's writer, who are the first.
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
            "late", "destroy" (its group), "server" (rank 0, which has the store's server, is killed), "store" (that
            server is a process of its own, and is killed), "full", "spill" or "later" (there is no shared memory: for
            its group, which asks for it by name or not, or for results), "writer" or "reader" (of a message queue:
            killed), "unread" (it reads nothing from one), or a call that differs.
        when: before, during or after a collective.
        says: a regular expression that the error of every rank that is told must match, or what came of a fault that
            is survived; ``{culprit}`` is the culprit's place, ``{where}`` what says that its call was compiled.
        checked: the ranks run under `check_collectives`, which promises the same words on every transport.
        far: the queue's readers are as if on another node than its writer.
        transports, modes: the cells that there are.
    """

    name: str
    act: str
    when: str
    says: str
    checked: bool = False
    far: bool = False
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

    @property
    def room(self) -> bool:
        """Is it about room in shared memory?"""
        return self.act in ("full", "spill", "later")

    @property
    def served_apart(self) -> bool:
        """Is the store's server a process of its own, as under torchrun? Else rank 0 has it."""
        return self.act == "store" or self.far

    def culprit(self, world_size: int) -> int:
        """The rank that commits or suffers it; -1 where all ranks are alike."""
        return -1 if self.act == "store" else 0 if self.act in ("server", "writer") else world_size - 1

    def tells(self, rank: int, world_size: int) -> bool:
        """Must what `rank` was told match `says`?"""
        return rank != self.culprit(world_size) or self.checked or self.room


_NAMED = r"fvops\.\w+ on group 'brief:0'.* failed .*place {culprit}\b"
_TOLD = r"fvops\.\w+ on group 'brief:0'.* failed "
# Who is missing cannot be asked where the store was, except that it was on rank 0.
_SERVER = _TOLD + r".*(place 0 \(|the store is gone, and with it perhaps global rank 0)"
_TABLE = (
    r"was not issued, the ranks do not agree: (the ranks' {what} differ|rank \d+ was refused)(.|\n)*"
    r"\n  {culprit} +\|[^\n]*{where}"
)
# Who waits for a rank that has found it out already learns that this one was refused.
_CIRCLE = (
    r"the ranks wait for one another: [^\n]*rank {culprit} waits in all_to_all_4D on group 'other:0'(.|\n)*"
    r"\n  {culprit} +\| other:0 [^\n]*{where}|rank \d+ was refused a call"
)
# The writer knows who does not read; it leaves the queue, and that is what the other readers learn, unless their own
# deadlines pass in that moment.
_QUEUE = (
    _TOLD + r".*(place {culprit}, a reader, .* %s|place 0, the writer, .* (has left the queue|did not come in time))"
)
_FAR_WRITER = _TOLD + r".*place 0, the writer, has not written message \d+ \(read over the store\)"
_FAR_QUEUE = (
    _TOLD + r".*(places \[{culprit}\], which read over the store, have not read message"
    r"|place 0, the writer, has (left the queue|not written message \d+ \(read over the store\)))"
)
# The first long result is made while there is no room, the second once there is some again.
_LATER = (
    r"right results over shared memory, right long results, "
    r"(1 of 2 of shared memory on rank {culprit}|2 of 2 of shared memory on rank (?!{culprit}$)\d)$"
)
_UNMADE = (
    r"group 'brief' of global ranks .* could not be made .*the server of torch.distributed's store does not answer"
)
_ONCE: Any = {"transports": ("shm",), "modes": ("eager",)}

FAULTS = [
    *(Fault(f"SIGKILL {when} a collective", "kill", when, _NAMED) for when in ("before", "during", "after")),
    *(Fault(f"SIGSTOP {when} a collective", "stop", when, _NAMED) for when in ("before", "during", "after")),
    *(Fault(f"exception {when} a collective", "raise", when, _NAMED) for when in ("before", "during", "after")),
    Fault("late by more than the deadline", "late", "before", _NAMED),
    Fault("other shapes", "shapes", "before", _TABLE.replace("{what}", "shapes"), checked=True),
    Fault("other dtypes", "dtypes", "before", _TABLE.replace("{what}", "dtypes"), checked=True),
    Fault("another op", "ops", "before", _TABLE.replace("{what}", "ops"), checked=True),
    Fault("another order", "order", "before", _TABLE.replace("{what}", "ops"), checked=True),
    Fault("another group", "groups", "before", _CIRCLE, checked=True),
    Fault("destroy while a peer is inside a call", "destroy", "before", _NAMED),
    Fault(
        "/dev/shm full, shared memory asked for by name",
        "full",
        "before",
        r"FVOPS_TRANSPORT=shm, but place {culprit}: .*no room",
        **_ONCE,
    ),
    Fault(
        "/dev/shm full, fvops chooses the transport",
        "spill",
        "before",
        r"right results over torch.distributed \(gloo\), said (1 times on rank 0|0 times on rank [1-9])$",
        transports=("shm",),
    ),
    Fault("/dev/shm full later", "later", "before", _LATER, transports=("shm",)),
    Fault("rank 0 dead, which has the store's server", "server", "before", _SERVER),
    Fault("the store's server dead, and no rank", "store", "before", _UNMADE),
    Fault("the message queue full", "unread", "before", _QUEUE % "did not come in time", **_ONCE),
    Fault(
        "the message queue's writer dead",
        "writer",
        "during",
        _TOLD + r".*place 0, the writer, .* has died",
        **_ONCE,
    ),
    Fault("a reader of the message queue dead", "reader", "during", _QUEUE % "has died", **_ONCE),
    Fault("the message queue full, over the store", "unread", "before", _FAR_QUEUE, far=True, **_ONCE),
    Fault("the message queue's writer dead, over the store", "writer", "during", _FAR_WRITER, far=True, **_ONCE),
    Fault("a reader of the message queue dead, over the store", "reader", "during", _FAR_QUEUE, far=True, **_ONCE),
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
