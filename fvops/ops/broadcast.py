"""broadcast: a new tensor, equal to that of one rank, on every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fvops import checks
from fvops.ops._define import Group, checked_in_python, define
from fvops.registry import resolve

__all__ = ["broadcast"]


def broadcast(group: Group, input_: Tensor, src: int) -> Tensor:
    """The tensor of place `src`; elsewhere `input_` gives shape and dtype.

    The gradient is summed on `src` and zero elsewhere. Backward is a collective: the input must require a gradient on
    every rank or on none.
    """
    if checked_in_python(group, input_):
        check(input_, src, group.world_size, group.unique_name)
        checks.check_device("broadcast", group.unique_name, input_, group.device)
    if group.world_size == 1:
        return input_
    return op(input_, src, group.world_size, group.unique_name)


def check(input_: Tensor, src: int, world_size: int, group_name: str) -> None:
    checks.check_strided("broadcast", group_name, input_)
    checks.check_place("broadcast", group_name, "src", src, world_size)


def eager(input_: Tensor, src: int, world_size: int, group_name: str) -> Tensor:
    return resolve(group_name, world_size).broadcast(input_, src)


def fake(input_: Tensor, src: int, world_size: int, group_name: str) -> Tensor:
    check(input_, src, world_size, group_name)
    return input_.new_empty(input_.shape)


def backward(grad: Tensor, input_shape: Any, src: int, world_size: int, group_name: str) -> Tensor:
    return torch.ops.fvops.reduce.default(grad, "sum", src, world_size, group_name)


op = define(
    "broadcast(Tensor input, int src, int world_size, str group_name) -> Tensor",
    eager=eager,
    fake=fake,
    backward=backward,
)
