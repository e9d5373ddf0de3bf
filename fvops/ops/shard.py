"""shard: this rank's slice of a tensor that every rank has. Nothing is sent; only its gradient is a collective."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fvops import checks
from fvops.ops._define import Group, checked_in_python, define
from fvops.registry import resolve

__all__ = ["shard"]


def shard(group: Group, input_: Tensor, dim: int, scale_grad: bool) -> Tensor:
    """``[..., N, ...] -> [..., N/P, ...]`` along `dim`; backward all-gathers, divided by P if `scale_grad`."""
    if checked_in_python(group, input_):
        checks.check_chunks("shard", group.unique_name, input_, dim, group.world_size)
        checks.check_device("shard", group.unique_name, input_, group.device)
    if group.world_size == 1:
        return input_
    return op(input_, dim, scale_grad, group.rank_in_group, group.world_size, group.unique_name)


def eager(input_: Tensor, dim: int, scale_grad: bool, rank: int, world_size: int, group_name: str) -> Tensor:
    communicator = resolve(group_name, world_size)
    checks.check_own_rank("shard", group_name, rank, communicator.rank_in_group)
    return communicator.shard(input_, dim)


def fake(input_: Tensor, dim: int, scale_grad: bool, rank: int, world_size: int, group_name: str) -> Tensor:
    dim = checks.check_chunks("shard", group_name, input_, dim, world_size)
    shape = list(input_.shape)
    shape[dim] = shape[dim] // world_size
    return input_.new_empty(shape)


def backward(
    grad: Tensor, input_shape: Any, dim: int, scale_grad: bool, rank: int, world_size: int, group_name: str
) -> Tensor:
    gathered = torch.ops.fvops.all_gather.default(grad, dim, world_size, group_name)
    return gathered / world_size if scale_grad else gathered


op = define(
    "shard(Tensor input, int dim, bool scale_grad, int rank, int world_size, str group_name) -> Tensor",
    eager=eager,
    fake=fake,
    backward=backward,
    ordered=False,
)
