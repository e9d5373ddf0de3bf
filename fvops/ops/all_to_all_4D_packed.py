"""all_to_all_4D_packed: 4D exchanges whose layout is computed outside of them; made by the compiler, not by users.

It sends the same parts to the same peers as `all_to_all_4D` (or `all_to_all_4D_coalesced`) does, and is recorded as
that, with the shapes of the tensors that the user handed in.

Letters: P world size, B batch, S sequence, H heads, D head size, s = S/P, h = H/P.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fvops.checks import check_all_to_all_4D_packed
from fvops.ops._define import define
from fvops.registry import resolve

__all__ = ["op"]


def eager(
    sends: list[Tensor], scatter_dim: int, gather_dim: int, single: bool, world_size: int, group_name: str
) -> list[Tensor]:
    return resolve(group_name, world_size).all_to_all_4D_packed(sends, scatter_dim, gather_dim, single)


def fake(
    sends: list[Tensor], scatter_dim: int, gather_dim: int, single: bool, world_size: int, group_name: str
) -> list[Tensor]:
    check_all_to_all_4D_packed(group_name, sends, scatter_dim, gather_dim, world_size)
    return [send.new_empty(send.shape) for send in sends]


def backward(
    grads: Sequence[Tensor],
    input_shapes: Any,
    scatter_dim: int,
    gather_dim: int,
    single: bool,
    world_size: int,
    group_name: str,
) -> list[Tensor]:
    return op(list(grads), gather_dim, scatter_dim, single, world_size, group_name)


# sends_PBSHD[i][j] goes to place j; (2,1): [P, B, S, h, D], (1,2): [P, B, s, H, D]. Results alike, by source.
op = define(
    "all_to_all_4D_packed(Tensor[] sends, int scatter_dim, int gather_dim, bool single, int world_size, "
    "str group_name) -> Tensor[]",
    eager=eager,
    fake=fake,
    backward=backward,
)
