"""gather: one rank gets the ranks' tensors concatenated along a dim."""

from __future__ import annotations

from torch import Tensor

from fvops import checks
from fvops.ops._define import Group, checked_in_python, define
from fvops.registry import resolve

__all__ = ["gather"]


def gather(group: Group, input_: Tensor, dst: int, dim: int) -> Tensor | None:
    """``[..., P*n, ...]`` on place `dst`, None elsewhere."""
    if checked_in_python(group, input_):
        check(input_, dst, dim, group.world_size, group.unique_name)
        refuse_grad(input_, dst, dim, group.rank_in_group, group.world_size, group.unique_name)
        checks.check_device("gather", group.unique_name, input_, group.device)
    if group.world_size == 1:
        return input_
    gathered = op(input_, dst, dim, group.rank_in_group, group.world_size, group.unique_name)
    return gathered if group.rank_in_group == dst else None


def check(input_: Tensor, dst: int, dim: int, world_size: int, group_name: str) -> int:
    checks.check_place("gather", group_name, "dst", dst, world_size)
    return checks.check_concat("gather", group_name, input_, dim)


def refuse_grad(input_: Tensor, dst: int, dim: int, rank: int, world_size: int, group_name: str) -> None:
    checks.check_no_grad("gather", group_name, input_)


def eager(input_: Tensor, dst: int, dim: int, rank: int, world_size: int, group_name: str) -> Tensor:
    communicator = resolve(group_name, world_size)
    checks.check_own_rank("gather", group_name, rank, communicator.rank_in_group)
    gathered = communicator.gather(input_, dst, dim)
    return input_.new_empty(0) if gathered is None else gathered


def fake(input_: Tensor, dst: int, dim: int, rank: int, world_size: int, group_name: str) -> Tensor:
    """The rank is an argument of the op, so that ranks with different results never share a cached graph."""
    dim = check(input_, dst, dim, world_size, group_name)
    if rank != dst:
        return input_.new_empty(0)
    shape = list(input_.shape)
    shape[dim] = shape[dim] * world_size
    return input_.new_empty(shape)


op = define(
    "gather(Tensor input, int dst, int dim, int rank, int world_size, str group_name) -> Tensor",
    eager=eager,
    fake=fake,
    refuse_grad=refuse_grad,
)
