"""all_gather: every rank gets the ranks' tensors concatenated along a dim."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fvops import checks
from fvops.ops._define import Group, checked_in_python, define
from fvops.registry import resolve

__all__ = ["all_gather"]


def all_gather(group: Group, input_: Tensor, dim: int) -> Tensor:
    """``[..., n, ...] -> [..., P*n, ...]`` along `dim`."""
    if checked_in_python(group, input_):
        checks.check_concat("all_gather", group.unique_name, input_, dim)
        checks.check_device("all_gather", group.unique_name, input_, group.device)
    if group.world_size == 1:
        return input_
    return op(input_, dim, group.world_size, group.unique_name)


def eager(input_: Tensor, dim: int, world_size: int, group_name: str) -> Tensor:
    return resolve(group_name, world_size).all_gather(input_, dim)


def fake(input_: Tensor, dim: int, world_size: int, group_name: str) -> Tensor:
    dim = checks.check_concat("all_gather", group_name, input_, dim)
    shape = list(input_.shape)
    shape[dim] = shape[dim] * world_size
    return input_.new_empty(shape)


def backward(grad: Tensor, input_shape: Any, dim: int, world_size: int, group_name: str) -> Tensor:
    return torch.ops.fvops.reduce_scatter.default(grad, "sum", dim, world_size, group_name)


op = define(
    "all_gather(Tensor input, int dim, int world_size, str group_name) -> Tensor",
    eager=eager,
    fake=fake,
    backward=backward,
)
