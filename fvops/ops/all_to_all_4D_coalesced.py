"""all_to_all_4D_coalesced: the Ulysses exchange of several tensors (q, k, v) as one grouped exchange.

Each tensor keeps its own rank-major layout: an interleaved buffer would cost a copy at the receiver.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fvops import checks
from fvops.ops._define import Group, checked_in_python, define
from fvops.ops.all_to_all_4D import fake as fake_one
from fvops.registry import resolve

__all__ = ["all_to_all_4D_coalesced"]


def all_to_all_4D_coalesced(group: Group, inputs: Sequence[Tensor], scatter_dim: int, gather_dim: int) -> list[Tensor]:
    """`all_to_all_4D` of each input; shapes and dtypes may differ."""
    inputs = list(inputs)
    # The dispatcher has no word for a list without tensors, and none for one of them being a meta tensor.
    plain = len(inputs) > 0 and all(isinstance(input_, Tensor) and not input_.is_meta for input_ in inputs)
    if not plain or checked_in_python(group, inputs[0]):
        checks.check_all_to_all_4D_coalesced(group.unique_name, inputs, scatter_dim, gather_dim, group.world_size)
        for input_ in inputs:
            checks.check_device("all_to_all_4D_coalesced", group.unique_name, input_, group.device)
    if group.world_size == 1:
        return inputs
    return op(inputs, scatter_dim, gather_dim, group.world_size, group.unique_name)


def eager(inputs: list[Tensor], scatter_dim: int, gather_dim: int, world_size: int, group_name: str) -> list[Tensor]:
    return resolve(group_name, world_size).all_to_all_4D_coalesced(inputs, scatter_dim, gather_dim)


def fake(inputs: list[Tensor], scatter_dim: int, gather_dim: int, world_size: int, group_name: str) -> list[Tensor]:
    checks.check_all_to_all_4D_coalesced(group_name, inputs, scatter_dim, gather_dim, world_size)
    return [fake_one(input_, scatter_dim, gather_dim, world_size, group_name) for input_ in inputs]


def backward(
    grads: Sequence[Tensor], input_shapes: Any, scatter_dim: int, gather_dim: int, world_size: int, group_name: str
) -> list[Tensor]:
    return op(list(grads), gather_dim, scatter_dim, world_size, group_name)


op = define(
    "all_to_all_4D_coalesced(Tensor[] inputs, int scatter_dim, int gather_dim, int world_size, str group_name) "
    "-> Tensor[]",
    eager=eager,
    fake=fake,
    backward=backward,
)
