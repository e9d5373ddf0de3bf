"""How Inductor runs the in-place products that `absorb` writes: as ATen does, on operands as they lie.

Left to itself Inductor would make a fallback the first time it meets one. That fallback fails where the environment
variable CI is set, since the op has a decomposition; and met first in a backward graph it would copy every operand
that is not contiguous, the buffer that is added to among them.

Checked on torch 2.11 and 2.13; `compile_tests/test_pass_absorb.py` compiles with CI set.
"""

from __future__ import annotations

import torch
from torch._inductor.lowering import lowerings, make_fallback

__all__ = ["register"]


def register() -> None:
    """Register the lowering of `addmm_`, if torch has none of its own."""
    op = torch.ops.aten.addmm_.default
    if op not in lowerings:
        make_fallback(op, warn=False)
