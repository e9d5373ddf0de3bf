"""barrier: no rank goes on before every rank has come. Host-side, over the CPU group."""

from __future__ import annotations

from fvops.ops._define import Group, define
from fvops.registry import resolve

__all__ = ["barrier"]


def barrier(group: Group) -> None:
    """Wait for every rank of the group, at most ``FVOPS_TIMEOUT_S`` seconds."""
    op(group.world_size, group.unique_name)


def eager(world_size: int, group_name: str) -> None:
    resolve(group_name, world_size).barrier()


def fake(world_size: int, group_name: str) -> None:
    return None


op = define("barrier(int world_size, str group_name) -> ()", eager=eager, fake=fake)
