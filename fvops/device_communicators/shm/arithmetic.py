"""Reducing the ranks' terms: always in the order of their places, so that whoever reduces gets the same bits.

Half precision and float8 are accumulated in float32 and rounded once. Integers wrap around. NaN wins in max and min.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["REDUCTIONS", "combine"]

_STEPS: dict[str, Callable[..., Any]] = {
    "sum": torch.add,
    "avg": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "product": torch.mul,
}
REDUCTIONS = tuple(_STEPS)

_ROUNDED_ONCE = {
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
}
# torch has no arithmetic for these; sums and products of the signed ones have the same bits.
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def combine(output: Tensor, terms: Sequence[Tensor], reduce_op: str) -> None:
    """Reduce `terms`, at least two of one shape, into `output`, which is other memory than theirs.

    Args:
        reduce_op: one of `REDUCTIONS`; "avg" divides by the number of terms.
    """
    dtype = output.dtype
    if dtype in _ROUNDED_ONCE:
        wide = torch.empty(output.shape, dtype=torch.float32)
        _reduce(wide, [term.to(torch.float32) for term in terms], reduce_op)
        output.copy_(wide)
    elif dtype == torch.bool:
        _reduce(output.view(torch.uint8), [term.view(torch.uint8) for term in terms], reduce_op)
    elif dtype in _SIGNED:
        signed = _SIGNED[dtype]
        if reduce_op in ("max", "min"):
            # Flipping the highest bit turns the order of unsigned numbers into that of signed ones.
            highest = torch.iinfo(signed).min
            flipped = [term.view(signed) ^ highest for term in terms]
            _reduce(flipped[0], flipped, reduce_op)
            output.view(signed).copy_(flipped[0] ^ highest)
        else:
            _reduce(output.view(signed), [term.view(signed) for term in terms], reduce_op)
    else:
        _reduce(output, terms, reduce_op)


def _reduce(output: Tensor, terms: Sequence[Tensor], reduce_op: str) -> None:
    step = _STEPS[reduce_op]
    step(terms[0], terms[1], out=output)
    for term in terms[2:]:
        step(output, term, out=output)
    if reduce_op == "avg":
        output.div_(len(terms))
