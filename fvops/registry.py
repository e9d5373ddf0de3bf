"""From a group's name to what runs its collectives: the one place where an op's ``group_name`` is resolved.

A compiled graph holds names, not process groups, so that it survives the groups: after destroy and re-creation under
the same name it finds the new group here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fvops.device_communicators.base_device_communicator import DeviceCommunicatorBase

__all__ = ["agree_on_name", "find", "register", "registered_names", "resolve", "unregister"]

_communicators: dict[str, DeviceCommunicatorBase] = {}
_destroyed: set[str] = set()


def register(group_name: str, communicator: DeviceCommunicatorBase) -> None:
    """Make `communicator` the one that ops with this `group_name` run on."""
    if group_name in _communicators:
        raise RuntimeError(f"a group named {group_name!r} is registered already; destroy it first")
    _communicators[group_name] = communicator
    _destroyed.discard(group_name)


def unregister(group_name: str) -> None:
    """Forget the group; calls under its name raise from now on. Unknown names are ignored."""
    if _communicators.pop(group_name, None) is not None:
        _destroyed.add(group_name)


def registered_names() -> list[str]:
    """The names of the groups that exist on this rank."""
    return sorted(_communicators)


def find(group_name: str) -> DeviceCommunicatorBase | None:
    """The communicator of `group_name`, None if there is no such group now."""
    return _communicators.get(group_name)


def resolve(group_name: str, world_size: int) -> DeviceCommunicatorBase:
    """The communicator of `group_name`.

    Raises:
        RuntimeError: no such group, or it was destroyed, or it is not of `world_size` ranks (a graph that was compiled
            or exported for another world).
    """
    communicator = _communicators.get(group_name)
    if communicator is None:
        if group_name in _destroyed:
            raise RuntimeError(f"group {group_name!r} was destroyed; initialize it again before using it")
        known = ", ".join(map(repr, registered_names())) or "none"
        raise RuntimeError(f"there is no group {group_name!r} on this rank; registered groups: {known}")
    if communicator.world_size != world_size:
        raise RuntimeError(
            f"group {group_name!r} has {communicator.world_size} ranks, but the call was made for {world_size}: "
            "a function traced or exported for one world size cannot run in another"
        )
    return communicator


def agree_on_name(base: str, all_reduce_max: Callable[[int], int]) -> str:
    """``"{base}:{n}"`` with the smallest n that is free on every rank of the new group.

    Each round raises n to the largest of the ranks' own smallest free numbers; it ends when that leaves n unchanged.
    All ranks see the same n and so leave together, whatever each has created or destroyed before.

    Args:
        base: the group's plain name.
        all_reduce_max: the largest of the ranks' integers, on every rank.
    """
    n = 0
    while True:
        free = n
        while f"{base}:{free}" in _communicators:
            free += 1
        agreed = all_reduce_max(free)
        if agreed == n:
            return f"{base}:{n}"
        n = agreed
