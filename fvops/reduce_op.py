"""Names for reductions: an op's schema carries a string, the public methods take ``torch.distributed.ReduceOp``."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from fvops.checks import fail

__all__ = ["reduce_op_name"]


def reduce_op_name(op: Any) -> str:
    """``"sum"``, ``"avg"``, ``"max"``, ``"min"`` or ``"product"`` for a ReduceOp, for such a string, or None (sum).

    Raises:
        ValueError: another reduction (bitwise ones, PREMUL_SUM).
    """
    if isinstance(op, str):
        return op
    # Comparisons rather than a dict: Dynamo traces them, and they accept ReduceOp objects beside its enum values.
    if op is None or op == dist.ReduceOp.SUM:
        return "sum"
    if op == dist.ReduceOp.AVG:
        return "avg"
    if op == dist.ReduceOp.MAX:
        return "max"
    if op == dist.ReduceOp.MIN:
        return "min"
    if op == dist.ReduceOp.PRODUCT:
        return "product"
    fail(ValueError, f"unsupported reduction {op!r}; use ReduceOp.SUM, AVG, MAX, MIN or PRODUCT")
