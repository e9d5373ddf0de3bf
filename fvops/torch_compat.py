"""Names of torch that differ between the versions we run on (2.11 to 2.13), or are not public; each says which."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_gather_flat", "new_group", "reduce_scatter_flat", "symmetric_empty", "symmetric_rendezvous"]

# torch 2.13 renames these two and warns at every call of the old names. Remove once torch >= 2.13 is required.
all_gather_flat = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def new_group(ranks: list[int], backend: str, deadline: timedelta) -> Any:
    """``dist.new_group``, also where the world was given a ``device_id``. Collective. Torch 2.11 to 2.13.

    With a ``device_id`` torch has the ranks outside `ranks` split the world's communicator, whatever the new group's
    backend: gloo has no such method, and on NCCL the ranks inside, who make a gloo group, would not come to it.
    """
    world: Any = dist.group.WORLD
    device_id = world.bound_device_id
    if device_id is not None and "gloo" in backend:
        world.bound_device_id = None
    try:
        return dist.new_group(ranks, backend=backend, timeout=deadline)
    finally:
        if device_id is not None:
            world.bound_device_id = device_id


def symmetric_empty(nbytes: int, device: torch.device) -> Tensor:
    """Memory that peers can map, ``[nbytes]`` uint8: an allocation of its own, not one of a pool. Torch 2.11 to 2.13.

    ``_symmetric_memory.empty`` may hand out a piece of a pool, whose neighbours and life are not ours.
    """
    from torch._C._distributed_c10d import _SymmetricMemory

    return _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, device)


def symmetric_rendezvous(memory: Tensor, group: dist.ProcessGroup) -> Any:
    """Map the peers' `memory`, from `symmetric_empty` and of one size on all ranks. Collective. Torch 2.11 to 2.13.

    Returns torch's handle: ``buffer_ptrs`` has each rank's address in this process, while handle and `memory` live.
    """
    from torch.distributed import _symmetric_memory

    return _symmetric_memory.rendezvous(memory, group.group_name)
