"""One collective as a communicator is about to issue it, and who wants to see it first.

Communicators look at `observers` before each call: an empty list is all that recording and checking cost when off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Call", "Member", "fake_observers", "observe", "observers"]


@dataclass(frozen=True)
class Member:
    """One rank's place in one group.

    Attributes:
        group: the group's ``unique_name``.
        life: a number that its ranks agreed on: it tells the group from earlier ones of that name.
        place: this rank's place in the group.
        ranks: the group's global ranks.
        timeout_s: deadline of a wait for the group's other ranks, seconds.
    """

    group: str
    life: int
    place: int
    ranks: tuple[int, ...]
    timeout_s: float


@dataclass(frozen=True)
class Call:
    """A collective, or a message between two ranks.

    Attributes:
        member: who is about to issue it.
        op: the op's name, as in ``torch.ops.fvops``.
        tensors: what is handed in (for `recv`, what is to be filled).
        arguments: the op's other arguments that the transport sees.
        way: "collective", or "{sender}-{receiver}" (places) for a message.
        number: how many calls went this way in this group, with this one.
    """

    member: Member
    op: str
    tensors: tuple[Tensor, ...]
    arguments: dict[str, Any]
    way: str
    number: int


# Called in this order before a collective is issued; one that raises keeps it from being issued.
observers: list[Callable[[Call], None]] = []
# Called with an op's overload and arguments whenever it runs on fake tensors, traced or not: nothing is issued then.
fake_observers: list[Callable[[Any, tuple[Any, ...]], None]] = []


def observe(call: Call) -> None:
    """Show `call` to every observer."""
    for observer in tuple(observers):
        observer(call)
