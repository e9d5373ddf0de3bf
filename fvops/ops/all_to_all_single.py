"""all_to_all_single: part j of dim 0 goes to rank j; the received parts are concatenated along dim 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fvops import checks
from fvops.ops._define import Group, checked_in_python, define
from fvops.registry import resolve

__all__ = ["all_to_all_single"]


def all_to_all_single(
    group: Group,
    input_: Tensor,
    output_split_sizes: Sequence[int] | None,
    input_split_sizes: Sequence[int] | None,
) -> Tensor:
    """``[N, ...] -> [M, ...]``: equal parts (M = N), or with sizes in rows, where M is the sum of the output sizes."""
    if checked_in_python(group, input_):
        name = group.unique_name
        checks.check_all_to_all_single(name, input_, output_split_sizes, input_split_sizes, group.world_size)
        checks.check_device("all_to_all_single", name, input_, group.device)
    if group.world_size == 1:
        return input_
    return op(input_, output_split_sizes, input_split_sizes, group.world_size, group.unique_name)


def eager(
    input_: Tensor,
    output_split_sizes: Sequence[int] | None,
    input_split_sizes: Sequence[int] | None,
    world_size: int,
    group_name: str,
) -> Tensor:
    return resolve(group_name, world_size).all_to_all_single(input_, output_split_sizes, input_split_sizes)


def fake(
    input_: Tensor,
    output_split_sizes: Sequence[int] | None,
    input_split_sizes: Sequence[int] | None,
    world_size: int,
    group_name: str,
) -> Tensor:
    checks.check_all_to_all_single(group_name, input_, output_split_sizes, input_split_sizes, world_size)
    rows = input_.size(0) if output_split_sizes is None else sum(output_split_sizes)
    return input_.new_empty((rows, *input_.shape[1:]))


def backward(
    grad: Tensor,
    input_shape: Any,
    output_split_sizes: Sequence[int] | None,
    input_split_sizes: Sequence[int] | None,
    world_size: int,
    group_name: str,
) -> Tensor:
    return op(grad, input_split_sizes, output_split_sizes, world_size, group_name)


op = define(
    "all_to_all_single(Tensor input, SymInt[]? output_split_sizes, SymInt[]? input_split_sizes, "
    "int world_size, str group_name) -> Tensor",
    eager=eager,
    fake=fake,
    backward=backward,
)
