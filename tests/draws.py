"""Tensors for tests: any shape, dtype and memory layout from a seed, the same in every process.

fvops is not imported here: the parent process builds the same tensors for the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

__all__ = [
    "ALL_DTYPES",
    "FLOATS",
    "INTEGERS",
    "LAYOUTS",
    "NUMBERS",
    "TINY_FLOATS",
    "bits",
    "layouts",
    "make",
    "profile",
    "shapes",
    "storage_bits",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TINY_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
NUMBERS = (*FLOATS, *TINY_FLOATS, *INTEGERS)
ALL_DTYPES = (*NUMBERS, torch.bool, torch.complex64)
LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded")

shapes = st.lists(st.sampled_from([0, 1, 1, 2, 3, 5]), min_size=1, max_size=4).map(tuple)
# One layout for each of up to four ranks: what a rank's memory looks like is its own affair.
layouts = st.lists(st.sampled_from(LAYOUTS), min_size=4, max_size=4)


def profile(examples: int) -> settings:
    """Hypothesis settings: the same draws every time; no shrinking, since a failure may cost new processes."""
    return settings(
        deadline=None,
        max_examples=examples,
        derandomize=True,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def make(shape: Sequence[int], dtype: torch.dtype, layout: str, seed: int, *, numbers: bool = False) -> Tensor:
    """A tensor of `shape` whose memory lies as `layout` says.

    Args:
        numbers: values whose sums stay finite (eighths from -4 to 4; any integer), instead of arbitrary bits.
    """
    shape = list(shape)
    logical = list(shape)
    if layout == "expanded" and shape:
        logical[seed % len(shape)] = min(1, shape[seed % len(shape)])
    values = _values(logical, dtype, torch.Generator().manual_seed(seed), numbers)
    if layout == "expanded":
        return values.expand(shape)
    if not shape or layout == "contiguous":
        return values
    if layout == "transposed":
        order = list(reversed(range(len(shape))))
        return values.permute(order).contiguous().permute(order)
    if layout == "strided":
        room = _values([*shape[:-1], 2 * shape[-1] + 1], dtype, torch.Generator().manual_seed(seed + 1), numbers)
        view = room[..., 1::2]
    else:
        room = _values([shape[0] + 2, *shape[1:]], dtype, torch.Generator().manual_seed(seed + 1), numbers)
        view = room[1:-1]
    view.copy_(values)
    return view


def _values(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, numbers: bool) -> Tensor:
    if dtype == torch.bool:
        return torch.randint(0, 2, list(shape), generator=generator).bool()
    if numbers and dtype.is_floating_point:
        return (torch.randint(-32, 33, list(shape), generator=generator) / 8).to(dtype)
    count = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8).view(dtype).reshape(list(shape))


def bits(x: Tensor) -> Tensor:
    """The elements' bytes in order: equal for equal bits, also of NaN."""
    # A clone, since contiguous() leaves a single element with whatever strides it has.
    return x.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def storage_bits(x: Tensor) -> Tensor:
    """A copy of all memory that `x` is a view of, also what lies between its elements."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage()).clone()
