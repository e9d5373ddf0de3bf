"""What the tests of a group of one rank share: every op on that group, whose results are known, and its inputs.

With ``FVOPS_TRANSPORT=nccl`` such a group goes through the library: the double on CPU tensors, NCCL on one GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.draws import make

__all__ = ["OPS", "group_of_one", "input_of", "warm"]

# The op `name` of the group `g` on x; alone, each gives x's values in a new tensor.
OPS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "all_to_all_4D": lambda x, g: torch.ops.fvops.all_to_all_4D(x, 2, 1, 1, g),
    "all_to_all_4D, back": lambda x, g: torch.ops.fvops.all_to_all_4D(x, 1, 2, 1, g),
    "all_to_all_4D_coalesced": lambda x, g: _joined(torch.ops.fvops.all_to_all_4D_coalesced(_split(x), 2, 1, 1, g)),
    "all_to_all_single": lambda x, g: torch.ops.fvops.all_to_all_single(x, None, None, 1, g),
    "all_to_all_single, splits": lambda x, g: torch.ops.fvops.all_to_all_single(x, [x.size(0)], [x.size(0)], 1, g),
    "all_reduce": lambda x, g: torch.ops.fvops.all_reduce(x, "sum", 1, g),
    "all_reduce, avg": lambda x, g: torch.ops.fvops.all_reduce(x, "avg", 1, g),
    "all_reduce, max": lambda x, g: torch.ops.fvops.all_reduce(x, "max", 1, g),
    "reduce": lambda x, g: torch.ops.fvops.reduce(x, "sum", 0, 1, g),
    "reduce_scatter": lambda x, g: torch.ops.fvops.reduce_scatter(x, "sum", 1, 1, g),
    "all_gather": lambda x, g: torch.ops.fvops.all_gather(x, 1, 1, g),
    "gather": lambda x, g: torch.ops.fvops.gather(x, 0, 2, 0, 1, g),
    "broadcast": lambda x, g: torch.ops.fvops.broadcast(x, 0, 1, g),
    "shard": lambda x, g: torch.ops.fvops.shard(x, 2, False, 0, 1, g),
}


def _split(x: Tensor) -> list[Tensor]:
    half = x.size(2) // 2
    return [x[:, :, :half], x[:, :, half:]]


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, 2)


def group_of_one() -> Any:
    """The sequence-parallel group; fails unless it has one rank and goes through the library."""
    import fvops
    from fvops import registry

    group = fvops.get_sp_group()
    transport = registry.resolve(group.unique_name, 1).transport.name
    assert transport == "nccl (pynccl)", transport
    return group


def input_of(
    seed: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, layout: str = "contiguous"
) -> Tensor:
    """``[2, 6, 4, 8]``, values that reduce exactly."""
    from tests.devices import on_device

    return on_device(make((2, 6, 4, 8), dtype, layout, seed, numbers=True), device)


def warm(group: Any) -> None:
    """What `graph_capture` wants before."""
    group.warmup([(2, 6, 4, 8)], torch.bfloat16)
