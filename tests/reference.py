"""What each collective should give: all ranks' inputs in one process, plain indexing, one element at a time.

Written from the formulas of the interface contract and from nothing else; fvops is not imported here. `inputs[j]` is
the tensor of place j, and each function returns the list of what the places get. Data movement is exact in every dtype;
reductions are computed in float64 (floats) or in Python's integers, wrapped to the dtype's width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "all_gather",
    "all_reduce",
    "all_to_all_4D",
    "all_to_all_single",
    "broadcast",
    "gather",
    "gradient_of_movement",
    "reduce",
    "reduce_scatter",
    "shard",
]


def all_gather(inputs: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Place j's slice n of `dim` becomes slice ``j*N + n``."""
    dim %= inputs[0].dim()
    size = inputs[0].size(dim)
    shape = list(inputs[0].shape)
    shape[dim] = size * len(inputs)
    output = torch.empty(shape, dtype=inputs[0].dtype)
    for j, x in enumerate(inputs):
        for n in range(size):
            output.select(dim, j * size + n).copy_(x.select(dim, n))
    return [output.clone() for _ in inputs]


def gather(inputs: Sequence[Tensor], dst: int, dim: int) -> list[Tensor | None]:
    """The concatenation on `dst`, None elsewhere."""
    everything = all_gather(inputs, dim)[0]
    return [everything if r == dst else None for r in range(len(inputs))]


def shard(inputs: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Place r keeps entries ``r*N/P`` up to ``(r+1)*N/P`` of its own tensor."""
    outputs = []
    for r, x in enumerate(inputs):
        size = x.size(dim) // len(inputs)
        outputs.append(torch.stack([x.select(dim, r * size + n) for n in range(size)], dim) if size else _none(x, dim))
    return outputs


def _none(x: Tensor, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = 0
    return torch.empty(shape, dtype=x.dtype)


def broadcast(inputs: Sequence[Tensor], src: int) -> list[Tensor]:
    """Everyone gets place `src`'s tensor."""
    return [inputs[src].clone() for _ in inputs]


def all_to_all_4D(inputs: Sequence[Tensor], scatter_dim: int, gather_dim: int) -> list[Tensor]:
    """(2, 1): ``y_r[b, j*S/P+s, h] = x_j[b, s, r*H/P+h]``; (1, 2): ``y_r[b, s, j*H+h] = x_j[b, r*S/P+s, h]``."""
    P = len(inputs)
    B, S, H, D = inputs[0].shape
    outputs = []
    for r in range(P):
        if (scatter_dim, gather_dim) == (2, 1):
            y = torch.empty(B, P * S, H // P, D, dtype=inputs[0].dtype)
            for b, j, s, h in itertools.product(range(B), range(P), range(S), range(H // P)):
                y[b, j * S + s, h] = inputs[j][b, s, r * (H // P) + h]
        else:
            y = torch.empty(B, S // P, P * H, D, dtype=inputs[0].dtype)
            for b, j, s, h in itertools.product(range(B), range(P), range(S // P), range(H)):
                y[b, s, j * H + h] = inputs[j][b, r * (S // P) + s, h]
        outputs.append(y)
    return outputs


def all_to_all_single(inputs: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """``rows[j][r]`` rows go from place j to place r; they arrive in the order of their senders."""
    outputs = []
    for r in range(len(inputs)):
        received = []
        for j, x in enumerate(inputs):
            start = sum(rows[j][:r])
            received += [x[start + n] for n in range(rows[j][r])]
        shape = (len(received), *inputs[0].shape[1:])
        y = torch.empty(shape, dtype=inputs[0].dtype)
        for n, row in enumerate(received):
            y[n] = row
        outputs.append(y)
    return outputs


def all_reduce(inputs: Sequence[Tensor], op: str) -> list[Tensor]:
    """The reduction, in the inputs' dtype, rounded once."""
    dtype = inputs[0].dtype
    exact = [_reduced(values, op, dtype) for values in zip(*(_numbers(x) for x in inputs), strict=True)]
    wide = torch.float64 if dtype.is_floating_point else torch.int64
    flat = torch.tensor(exact, dtype=wide).to(dtype)
    return [flat.reshape(inputs[0].shape).clone() for _ in inputs]


def reduce(inputs: Sequence[Tensor], op: str, dst: int) -> list[Tensor]:
    """The reduction on `dst`, zeros elsewhere."""
    reduced = all_reduce(inputs, op)[0]
    return [reduced if r == dst else torch.zeros(reduced.shape).to(reduced.dtype) for r in range(len(inputs))]


def reduce_scatter(inputs: Sequence[Tensor], op: str, dim: int) -> list[Tensor]:
    """Place r's slice of the reduction."""
    return shard(all_reduce(inputs, op), dim)


def _numbers(x: Tensor) -> list[float | int]:
    wide = torch.float64 if x.dtype.is_floating_point else torch.int64
    return x.to(wide).flatten().tolist()


def _reduced(values: Sequence[float | int], op: str, dtype: torch.dtype) -> float | int:
    if op == "max":
        return max(values)
    if op == "min":
        return min(values)
    number = math.prod(values) if op == "product" else sum(values)
    if op == "avg":
        return number / len(values)
    if dtype.is_floating_point:
        return number
    if dtype == torch.bool:
        return int(bool(number))
    bits = torch.iinfo(dtype).bits
    number = int(number) % 2**bits
    return number - 2**bits if torch.iinfo(dtype).min < 0 and number >= 2 ** (bits - 1) else number


def gradient_of_movement(
    forward: Callable[[list[Tensor]], Sequence[Tensor | None]], shapes: Sequence[Sequence[int]], grads: Sequence[Tensor]
) -> list[Tensor]:
    """The places' input gradients of any `forward` that only moves data, from all places' output gradients.

    Each input element is numbered, the numbers are sent through `forward`, and every output element's gradient is added
    to the element whose number it carries.
    """
    sizes = [math.prod(shape) for shape in shapes]
    starts = [sum(sizes[:j]) for j in range(len(sizes))]
    numbered = [
        torch.arange(start, start + size).reshape(list(shape))
        for start, size, shape in zip(starts, sizes, shapes, strict=True)
    ]
    total = [0.0] * sum(sizes)
    for numbers, grad in zip(forward(numbered), grads, strict=True):
        if numbers is not None:
            for number, value in zip(numbers.flatten().tolist(), grad.flatten().tolist(), strict=True):
                total[number] += value
    return [
        torch.tensor(total[start : start + size], dtype=torch.float64).reshape(list(shape))
        for start, size, shape in zip(starts, sizes, shapes, strict=True)
    ]
