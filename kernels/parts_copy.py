"""`copy_parts` in Triton: pairs of strided tensors (q, k and v) in one launch, each element read and written once.

Used on CUDA to pack for an exchange and to lay down what was received; `pack` calls it, `parts_plan` says how a copy is
cut into programs. Against a `Tensor.copy_` for each tensor it saves launches and moves 16 bytes at a time in any
dtype; what that is worth is not measured yet.

Importing this module needs triton. Nothing is allocated and nothing waits for the device, so a call may be captured in
a CUDA graph once its kernels are compiled. A kernel is compiled for each combination of: number of pairs, number of
axes, word width, block shape, which of the addresses and integers divide by 16, and which integers need 64 bits.
`do_not_specialize` keeps sizes of one from adding to these; triton 3.6 and 3.7 look at divisibility in tuples even if
told not to. A Wan model whose sequence length alone changes needs at most four (docs/kernels.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fvops.kernels.parts_plan import CopyConfig, describe, plan
from fvops.kernels.parts_torch import check_pairs

__all__ = ["DEFAULT_CONFIG", "MACHINE_ELEMENT", "CopyConfig", "copy_block", "copy_parts", "kernel_calls"]

DEFAULT_CONFIG = CopyConfig()
MACHINE_ELEMENT = {16: tl.int64, 8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


@triton.jit
def copy_block(
    program: tl.tensor,
    source: tl.tensor,
    destination: tl.tensor,
    part: tl.tuple,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Move block number `program` of one pair: columns vary fastest, then the other axes, then the blocks of rows.

    Both sides are so walked in long runs, whichever of them is the strided one.
    """
    column_blocks, columns, rows, source_row_stride, destination_row_stride = part[0]
    sizes, source_strides, destination_strides = part[1]
    first_column = (program % column_blocks).to(tl.int64) * COLUMNS
    program = program // column_blocks
    source_start = first_column
    destination_start = first_column
    for axis in tl.static_range(len(sizes)):
        index = (program % sizes[axis]).to(tl.int64) * UNIT
        program = program // sizes[axis]
        source_start += index * source_strides[axis]
        destination_start += index * destination_strides[axis]
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    # Offsets are multiplied by UNIT here, in sight of the compiler: that is how it knows them to be even, and
    # joins two 8-byte elements into a 16-byte access.
    mask = (row < rows)[:, None] & (first_column + column < columns.to(tl.int64) * UNIT)[None, :]
    source_offset = (source_start + row * source_row_stride * UNIT)[:, None] + column[None, :]
    destination_offset = (destination_start + row * destination_row_stride * UNIT)[:, None] + column[None, :]
    tl.store(destination + destination_offset, tl.load(source + source_offset, mask), mask)


@triton.jit(do_not_specialize=["programs", "parts"])
def _copy_parts(
    sources: tl.tuple,
    destinations: tl.tuple,
    programs: tl.tuple,
    parts: tl.tuple,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    first = 0
    for i in tl.static_range(len(sources)):
        if (program >= first) & (program < first + programs[i]):
            copy_block(program - first, sources[i], destinations[i], parts[i], UNIT, ROWS, COLUMNS)
        first += programs[i]


def kernel_calls(
    sources: Sequence[Tensor], destinations: Sequence[Tensor], config: CopyConfig
) -> Iterator[tuple[int, tuple[Any, ...], dict[str, int]]]:
    """The kernel's calls that copy the pairs: grid size, arguments and keywords of each."""
    for launch in plan(tuple(map(describe, sources, destinations)), config):
        element = MACHINE_ELEMENT[launch.word_bytes]
        arguments = (
            tuple(triton.reinterpret(sources[i], element) for i in launch.indices),
            tuple(triton.reinterpret(destinations[i], element) for i in launch.indices),
            tuple(part.programs for part in launch.parts),
            tuple((part[1:6], part[6:]) for part in launch.parts),
        )
        yield (
            launch.programs,
            arguments,
            {
                "UNIT": max(1, launch.word_bytes // 8),
                "ROWS": launch.rows_per_program,
                "COLUMNS": launch.columns_per_block,
                "num_warps": config.num_warps,
            },
        )


def copy_parts(sources: Sequence[Tensor], destinations: Sequence[Tensor], config: CopyConfig = DEFAULT_CONFIG) -> None:
    """Copy each source into the destination beside it, bit for bit: one launch if all are equally well aligned.

    A pair has one shape, dtype and device; strides are free, but the destinations must not overlap themselves, each
    other or a source. One more launch is needed for each further word width (see `parts_plan`).

    Raises:
        ValueError, TypeError: from `check_pairs`.
    """
    check_pairs(sources, destinations)
    if not sources:
        return
    device = sources[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for programs, arguments, keywords in kernel_calls(sources, destinations, config):
            _copy_parts[(programs,)](*arguments, **keywords)
