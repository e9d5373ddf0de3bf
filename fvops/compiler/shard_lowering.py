"""How Inductor runs `shard`: as a slice, which the kernels that read it take out of the whole by themselves.

As a call it would have the whole tensor laid down in memory, in a kernel of its own, and its part copied out of there.
A packaged program keeps the call: it may be loaded by another rank than the one it was compiled for, and the call
tells so. Other compiled code is never served to another rank, since the rank is an argument of the op. Types that
Inductor has no loops for on some device (float8 and smaller) keep the call, too.

Checked on torch 2.11 and 2.13; `compile_tests/test_shard.py` fails when the call is back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.ir import SliceView, TensorBox
from torch._inductor.lowering import clone, fallback_handler, lowerings, register_lowering
from torch._inductor.virtualized import V
from torch.utils._sympy.functions import FloorDiv

__all__ = ["register"]

_INTEGERS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_LOOPED = {*_INTEGERS, torch.float16, torch.bfloat16, torch.float32, torch.float64}


def register() -> None:
    """Register the lowering of `shard`."""
    op = torch.ops.fvops.shard.default
    if op not in lowerings:
        register_lowering(op, type_promotion_kind=None)(_lower)


def _lower(input_: Any, dim: int, scale_grad: bool, rank: int, world_size: int, group_name: str) -> Any:
    if V.graph.aot_mode or input_.get_dtype() not in _LOOPED:
        call = fallback_handler(torch.ops.fvops.shard.default, add_to_fallback_set=False)
        return call(input_, dim, scale_grad, rank, world_size, group_name)
    sizes = input_.get_size()
    dim %= len(sizes)
    # Tracing has checked that it is divisible.
    length = FloorDiv(sizes[dim], world_size)
    part = SliceView.create(input_.data, dim, rank * length, (rank + 1) * length, clamp=False)
    result = clone(TensorBox(part))
    # Its own memory, or each late reader would keep the whole alive; written by the kernel that reads it first.
    result.realize()
    return result
