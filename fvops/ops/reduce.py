"""reduce: one rank gets the reduction of the ranks' tensors, the others zeros; the gradient of `broadcast`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fvops import checks
from fvops.ops._define import define
from fvops.registry import resolve

__all__: list[str] = []


def check(input_: Tensor, reduce_op: str, dst: int, world_size: int, group_name: str) -> None:
    checks.check_strided("reduce", group_name, input_)
    checks.check_reduce_op("reduce", group_name, reduce_op, input_.dtype)
    checks.check_place("reduce", group_name, "dst", dst, world_size)


def refuse_grad(input_: Tensor, reduce_op: str, dst: int, world_size: int, group_name: str) -> None:
    if reduce_op != "sum":
        checks.check_no_grad("reduce", group_name, input_, f"{reduce_op} has no gradient")


def eager(input_: Tensor, reduce_op: str, dst: int, world_size: int, group_name: str) -> Tensor:
    return resolve(group_name, world_size).reduce(input_, dst, reduce_op)


def fake(input_: Tensor, reduce_op: str, dst: int, world_size: int, group_name: str) -> Tensor:
    check(input_, reduce_op, dst, world_size, group_name)
    return input_.new_empty(input_.shape)


def backward(grad: Tensor, input_shape: Any, reduce_op: str, dst: int, world_size: int, group_name: str) -> Tensor:
    return torch.ops.fvops.broadcast.default(grad, dst, world_size, group_name)


op = define(
    "reduce(Tensor input, str reduce_op, int dst, int world_size, str group_name) -> Tensor",
    eager=eager,
    fake=fake,
    backward=backward,
    refuse_grad=refuse_grad,
)
