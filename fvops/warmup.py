"""What must not happen in the first step or inside a CUDA-graph capture, done before: connections, buffers, pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fvops import checks

__all__ = ["warm_up"]


def warm_up(communicator: Any, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> None:
    """Run every collective once, and the 4D exchange, both ways, for each of `shapes`. Collective.

    Args:
        communicator: the group's device communicator.
        shapes: shapes ``[B, S/P, H, D]`` of what `all_to_all_4D` will be handed in mode (2, 1).
        dtype: their dtype.
    """
    P, rank, device = communicator.world_size, communicator.rank_in_group, communicator.device
    for shape in shapes:
        x = torch.zeros(tuple(shape), dtype=dtype, device=device)
        communicator.all_to_all_4D(communicator.all_to_all_4D(x, 2, 1), 1, 2)
        communicator.all_to_all_4D_coalesced(communicator.all_to_all_4D_coalesced([x, x, x], 2, 1), 1, 2)
    one = torch.zeros(P, P, P, 1, dtype=dtype, device=device)
    communicator.all_to_all_4D(communicator.all_to_all_4D(one), 1, 2)
    communicator.all_to_all_4D_coalesced([one, one])
    communicator.all_to_all_single(one)
    communicator.all_to_all_single(one, [1] * P, [1] * P)
    communicator.all_gather(one)
    communicator.broadcast(one)
    communicator.gather(one)
    if dtype in checks.REDUCIBLE and dtype != torch.bool:
        communicator.all_reduce(one)
        communicator.reduce(one, 0)
        communicator.reduce_scatter(one, dim=0)
    if P > 1:
        # Both ways round: a program may send to either neighbour.
        for step in (1, P - 1):
            communicator.send(one, (rank + step) % P)
            communicator.recv(one.shape, dtype, (rank - step) % P)
    communicator.barrier()
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)
