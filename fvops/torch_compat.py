"""Names of torch that differ between the versions we run on (2.11 to 2.13), or are not public; each says which."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_gather_flat", "reduce_scatter_flat", "symmetric_empty", "symmetric_rendezvous"]

# torch 2.13 renames these two and warns at every call of the old names. Remove once torch >= 2.13 is required.
all_gather_flat = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


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
