"""reduce_scatter: each rank gets its slice, along a dim, of the reduction of the ranks' tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fvops import checks
from fvops.ops._define import Group, checked_in_python, define
from fvops.registry import resolve

__all__ = ["reduce_scatter"]


def reduce_scatter(group: Group, input_: Tensor, reduce_op: str, dim: int) -> Tensor:
    """``[..., N, ...] -> [..., N/P, ...]`` along `dim`."""
    if checked_in_python(group, input_):
        check(input_, reduce_op, dim, group.world_size, group.unique_name)
        refuse_grad(input_, reduce_op, dim, group.world_size, group.unique_name)
        checks.check_device("reduce_scatter", group.unique_name, input_, group.device)
    if group.world_size == 1:
        return input_
    return op(input_, reduce_op, dim, group.world_size, group.unique_name)


def check(input_: Tensor, reduce_op: str, dim: int, world_size: int, group_name: str) -> int:
    checks.check_reduce_op("reduce_scatter", group_name, reduce_op, input_.dtype)
    return checks.check_chunks("reduce_scatter", group_name, input_, dim, world_size)


def refuse_grad(input_: Tensor, reduce_op: str, dim: int, world_size: int, group_name: str) -> None:
    if reduce_op not in ("sum", "avg"):
        checks.check_no_grad("reduce_scatter", group_name, input_, f"{reduce_op} has no gradient")


def eager(input_: Tensor, reduce_op: str, dim: int, world_size: int, group_name: str) -> Tensor:
    return resolve(group_name, world_size).reduce_scatter(input_, reduce_op, dim)


def fake(input_: Tensor, reduce_op: str, dim: int, world_size: int, group_name: str) -> Tensor:
    dim = check(input_, reduce_op, dim, world_size, group_name)
    shape = list(input_.shape)
    shape[dim] = shape[dim] // world_size
    return input_.new_empty(shape)


def backward(grad: Tensor, input_shape: Any, reduce_op: str, dim: int, world_size: int, group_name: str) -> Tensor:
    gathered = torch.ops.fvops.all_gather.default(grad, dim, world_size, group_name)
    return gathered / world_size if reduce_op == "avg" else gathered


op = define(
    "reduce_scatter(Tensor input, str reduce_op, int dim, int world_size, str group_name) -> Tensor",
    eager=eager,
    fake=fake,
    backward=backward,
    refuse_grad=refuse_grad,
)
