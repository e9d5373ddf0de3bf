"""Groups of ranks that are not there: to trace, on one process, what a program would do on many.

A compiled graph needs four constants of a group and never the group itself, so a coordinator without process groups is
enough. Nothing can be sent over it: a real call says so.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch

from fvops import parallel_state
from fvops.checks import fail
from fvops.group_coordinator import GroupCoordinator

__all__ = ["PlannedGroup", "is_planning", "planned_groups"]

_GROUPS = ("_WORLD", "_NODE", "_TP", "_SP", "_DP")


class PlannedGroup(GroupCoordinator):
    """A coordinator of `world_size` ranks that do not exist, as seen by the one at `rank`.

    Raises:
        ValueError: `rank` is not a place in the group.
    """

    def __init__(self, name: str, world_size: int, rank: int = 0, device: torch.device | str = "cpu") -> None:
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"planned group {name!r}: rank {rank} of {world_size}; needs 0 <= rank < world_size")
        self.unique_name = f"planned_{name}:0"
        self.ranks = list(range(world_size))
        self.world_size = world_size
        self.rank = self.local_rank = self.rank_in_group = rank
        self.device = torch.device(device)
        self.use_device_communicator = self.use_custom_op_call = True
        self._communicator = self.device_communicator = None
        self._owned_groups = []


@contextlib.contextmanager
def planned_groups(sp_size: int = 1, tp_size: int = 1, device: torch.device | str = "cpu") -> Iterator[PlannedGroup]:
    """Inside, `get_sp_group` and the other getters hand out planned groups; yields the sequence-parallel one.

    The world has as many ranks as both sizes divide. Whatever was initialized is in force again afterwards. Not for
    several threads at once.
    """
    for what, size in (("sp_size", sp_size), ("tp_size", tp_size)):
        if size < 1:
            fail(ValueError, f"planned_groups: {what}={size} must be at least 1")
    world_size = math.lcm(sp_size, tp_size)
    sizes = {"world": world_size, "node": world_size, "tp": tp_size, "sp": sp_size, "dp": world_size // sp_size}
    groups = {name: PlannedGroup(name, size, device=device) for name, size in sizes.items()}
    before = {name: getattr(parallel_state, name) for name in _GROUPS}
    for name in _GROUPS:
        setattr(parallel_state, name, groups[name[1:].lower()])
    try:
        yield groups["sp"]
    finally:
        for name, group in before.items():
            setattr(parallel_state, name, group)


def is_planning() -> bool:
    """Are planned groups in force?"""
    return isinstance(parallel_state._SP, PlannedGroup)
