"""Which ranks form a group, and the coordinators made of them; no state is kept here."""

from __future__ import annotations

import torch
import torch.distributed as dist

from fvops.group_coordinator import GroupCoordinator
from fvops.node import get_same_node_ranks

__all__ = [
    "another_group",
    "consecutive_ranks",
    "data_parallel_ranks",
    "group_in_world",
    "init_model_parallel_group",
    "init_world_group",
    "node_ranks",
]


def consecutive_ranks(world_size: int, size: int, what: str) -> list[list[int]]:
    """Groups of `size` consecutive ranks; ValueError, naming `what`, unless `size` divides the world."""
    if size < 1 or world_size % size != 0:
        raise ValueError(f"{what}={size} must divide the world size {world_size}")
    return [list(range(start, start + size)) for start in range(0, world_size, size)]


def data_parallel_ranks(world_size: int, sequence_size: int, size: int) -> list[list[int]]:
    """The DP groups ``range(i, world_size, sequence_size)``; ValueError unless `size` is theirs, or 1 (derive it)."""
    derived = world_size // sequence_size
    if size not in (1, derived):
        raise ValueError(
            f"data_parallel_size={size} must be 1 (derive it) or world size {world_size} / "
            f"sequence_model_parallel_size {sequence_size} = {derived}"
        )
    return [list(range(start, world_size, sequence_size)) for start in range(sequence_size)]


def node_ranks(cpu_group: dist.ProcessGroup, world_size: int) -> list[list[int]]:
    """The world's ranks, node by node. Collective over `cpu_group`, a group of all of them."""
    nodes: list[list[int]] = []
    while sum(map(len, nodes)) < world_size:
        first = next(rank for rank in range(world_size) if not any(rank in ranks for ranks in nodes))
        nodes.append(get_same_node_ranks(cpu_group, first))
    return nodes


def init_world_group(
    ranks: list[int], local_rank: int, backend: str, device: torch.device | None = None
) -> GroupCoordinator:
    """A coordinator named "world" over `ranks`, without a device communicator."""
    return GroupCoordinator(
        [ranks], local_rank, backend, use_device_communicator=False, group_name="world", device=device
    )


def init_model_parallel_group(
    group_ranks: list[list[int]],
    local_rank: int,
    backend: str,
    use_message_queue_broadcaster: bool = False,
    group_name: str | None = None,
    device: torch.device | None = None,
    *,
    timeout_s: float | None = None,
) -> GroupCoordinator:
    """A coordinator with a device communicator, over the group in `group_ranks` that this rank is in.

    Args:
        timeout_s: deadline of each wait for the group's other ranks, seconds; default ``FVOPS_TIMEOUT_S``.
    """
    return GroupCoordinator(
        group_ranks,
        local_rank,
        backend,
        use_device_communicator=True,
        use_message_queue_broadcaster=use_message_queue_broadcaster,
        group_name=group_name,
        device=device,
        timeout_s=timeout_s,
    )


def group_in_world(
    world: GroupCoordinator,
    group_ranks: list[list[int]],
    name: str,
    backend: str | None,
    timeout_s: float | None = None,
) -> GroupCoordinator:
    """A coordinator over `group_ranks`, on the world's device and, unless `backend` says otherwise, its backend."""
    same = backend is None or backend == dist.get_backend(world.device_group)
    return init_model_parallel_group(
        group_ranks,
        world.local_rank,
        backend or dist.get_backend(world.device_group),
        # TP groups carry the engine's control messages, for which a message queue is planned.
        use_message_queue_broadcaster=name.startswith("tp"),
        group_name=name,
        device=world.device if same else None,
        timeout_s=timeout_s,
    )


def another_group(
    world: GroupCoordinator, kind: str, size: int, backend: str | None, suffix: str, timeout_s: float | None
) -> GroupCoordinator:
    """One more group of `kind` ("tp", "sp") beside the current one, named ``{kind}_{suffix}``; as `group_in_world`."""
    what = {"tp": "tensor", "sp": "sequence"}[kind]
    ranks = consecutive_ranks(world.world_size, size, f"{what}_model_parallel_size")
    return group_in_world(world, ranks, f"{kind}_{suffix}" if suffix else kind, backend, timeout_s)
