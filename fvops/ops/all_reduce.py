"""all_reduce: every rank gets the reduction of all ranks' tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fvops import checks
from fvops.ops._define import Group, checked_in_python, define
from fvops.registry import resolve

__all__ = ["all_reduce"]


def all_reduce(group: Group, input_: Tensor, reduce_op: str) -> Tensor:
    """A new tensor shaped like `input_`; `reduce_op` is sum, avg, max, min or product."""
    if checked_in_python(group, input_):
        check(input_, reduce_op, group.world_size, group.unique_name)
        refuse_grad(input_, reduce_op, group.world_size, group.unique_name)
        checks.check_device("all_reduce", group.unique_name, input_, group.device)
    if group.world_size == 1:
        return input_
    return op(input_, reduce_op, group.world_size, group.unique_name)


def check(input_: Tensor, reduce_op: str, world_size: int, group_name: str) -> None:
    checks.check_strided("all_reduce", group_name, input_)
    checks.check_reduce_op("all_reduce", group_name, reduce_op, input_.dtype)


def refuse_grad(input_: Tensor, reduce_op: str, world_size: int, group_name: str) -> None:
    if reduce_op not in ("sum", "avg"):
        checks.check_no_grad("all_reduce", group_name, input_, f"{reduce_op} has no gradient")


def eager(input_: Tensor, reduce_op: str, world_size: int, group_name: str) -> Tensor:
    return resolve(group_name, world_size).all_reduce(input_, reduce_op)


def fake(input_: Tensor, reduce_op: str, world_size: int, group_name: str) -> Tensor:
    check(input_, reduce_op, world_size, group_name)
    return input_.new_empty(input_.shape)


def backward(grad: Tensor, input_shape: Any, reduce_op: str, world_size: int, group_name: str) -> Tensor:
    return op(grad, reduce_op, world_size, group_name)


op = define(
    "all_reduce(Tensor input, str reduce_op, int world_size, str group_name) -> Tensor",
    eager=eager,
    fake=fake,
    backward=backward,
    refuse_grad=refuse_grad,
)
