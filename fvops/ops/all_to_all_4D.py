"""all_to_all_4D: the Ulysses exchange, from sequence shards with all heads to the whole sequence with some, and back.

Jacobs et al., "DeepSpeed Ulysses" (2023), https://arxiv.org/abs/2309.14509.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fvops import checks
from fvops.ops._define import Group, checked_in_python, define
from fvops.registry import resolve

__all__ = ["all_to_all_4D"]


def all_to_all_4D(group: Group, input_: Tensor, scatter_dim: int, gather_dim: int) -> Tensor:
    """(2, 1): ``[B, S/P, H, D] -> [B, S, H/P, D]``; (1, 2): the inverse."""
    if checked_in_python(group, input_):
        checks.check_all_to_all_4D(group.unique_name, input_, scatter_dim, gather_dim, group.world_size)
        checks.check_device("all_to_all_4D", group.unique_name, input_, group.device)
    if group.world_size == 1:
        return input_
    return op(input_, scatter_dim, gather_dim, group.world_size, group.unique_name)


def eager(input_: Tensor, scatter_dim: int, gather_dim: int, world_size: int, group_name: str) -> Tensor:
    return resolve(group_name, world_size).all_to_all_4D(input_, scatter_dim, gather_dim)


def fake(input_: Tensor, scatter_dim: int, gather_dim: int, world_size: int, group_name: str) -> Tensor:
    checks.check_all_to_all_4D(group_name, input_, scatter_dim, gather_dim, world_size)
    shape = list(input_.shape)
    shape[scatter_dim] = shape[scatter_dim] // world_size
    shape[gather_dim] = shape[gather_dim] * world_size
    return input_.new_empty(shape)


def backward(
    grad: Tensor, input_shape: Any, scatter_dim: int, gather_dim: int, world_size: int, group_name: str
) -> Tensor:
    return op(grad, gather_dim, scatter_dim, world_size, group_name)


op = define(
    "all_to_all_4D(Tensor input, int scatter_dim, int gather_dim, int world_size, str group_name) -> Tensor",
    eager=eager,
    fake=fake,
    backward=backward,
)
