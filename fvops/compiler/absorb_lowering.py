"""How Inductor runs the sums of products that `absorb` writes: as a call, on operands as they lie.

Left to itself Inductor would make a fallback the first time it meets the op, and choose its own constraint on the
operands' strides; this one has none. Today both give the same kernels: no test fails without it.

Checked on torch 2.11 and 2.13.
"""

from __future__ import annotations

import torch
from torch._inductor.lowering import lowerings, make_fallback

__all__ = ["register"]


def register() -> None:
    """Register the lowering of `sum_of_products`."""
    op = torch.ops.fvops.sum_of_products.default
    if op not in lowerings:
        make_fallback(op, warn=False)
