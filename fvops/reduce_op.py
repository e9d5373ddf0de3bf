"""Names for reductions: an op's schema carries a string, the public methods take ``torch.distributed.ReduceOp``."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from fvops.checks import fail

__all__ = ["reduce_op_name"]

_NAMES = {"SUM": "sum", "AVG": "avg", "MAX": "max", "MIN": "min", "PRODUCT": "product"}


def reduce_op_name(op: Any) -> str:
    """``"sum"``, ``"avg"``, ``"max"``, ``"min"`` or ``"product"`` for a ReduceOp, for such a string, or None (sum).

    Raises:
        ValueError: another reduction (bitwise ones, PREMUL_SUM).
    """
    if isinstance(op, str):
        return op
    if op is None:
        return "sum"
    # By name: Dynamo of torch 2.11 can neither compare nor identify these enum values.
    if isinstance(op, dist.ReduceOp.RedOpType):
        if op.name in _NAMES:
            return _NAMES[op.name]
    elif isinstance(op, dist.ReduceOp):  # the object around an enum value, as ``ReduceOp(ReduceOp.SUM)`` gives it
        for name, short in _NAMES.items():
            if op == getattr(dist.ReduceOp, name):
                return short
    fail(ValueError, f"unsupported reduction {op!r}; use ReduceOp.SUM, AVG, MAX, MIN or PRODUCT")
