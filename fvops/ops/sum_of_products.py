"""sum_of_products: ``left_0 @ right_0 + left_1 @ right_1 + ...`` in one buffer; `absorb` puts it into lowered graphs.

One op, rather than a product and further ones added to it in place: a graph in which nothing is written twice leaves
Inductor no order to lose. (On torch 2.11 it loses it: fusing C++ loops of different ranges, it forgets that one of them
reads what was written in place, and may run it before.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from fvops.ops._define import define

__all__ = ["op"]


def sum_of_products(bias: Tensor | None, left: list[Tensor], right: list[Tensor]) -> Tensor:
    """``[R, K_p] @ [K_p, C]`` summed over p -> ``[R, C]``, plus `bias`, which is broadcast to that."""
    first = torch.mm(left[0], right[0]) if bias is None else torch.addmm(bias, left[0], right[0])
    for left_RK, right_KC in zip(left[1:], right[1:], strict=True):
        first.addmm_(left_RK, right_KC)
    return first


def _fake(bias: Tensor | None, left: list[Tensor], right: list[Tensor]) -> Tensor:
    return left[0].new_empty((left[0].size(0), right[0].size(1)))


op = define(
    "sum_of_products(Tensor? bias, Tensor[] left, Tensor[] right) -> Tensor",
    eager=sum_of_products,
    fake=_fake,
    ordered=False,
    differentiated=False,
)
