"""How the strided copies of one exchange are cut into programs: the geometry of `parts_copy`, in plain integers.

A pair of same-shape tensors is reduced to a *row*, the longest run of bytes that is contiguous on both sides, and the
axes that remain when neighbours are merged. The pack of a contiguous ``[B, S, H, D]``, for example, has rows of ``h*D``
elements and two axes: ranks, and batch with sequence. Bytes are moved, so the dtype matters only for its size.

Rows are moved in *words* of 16, 8, 4, 2 or 1 bytes: the widest that divides both addresses, every stride and the row.
A program moves a block of rows by columns. The axis with most entries gives the block its rows, so the only division
is of the program's number, never of a row's or an element's; all else about a pair is uniform over the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

__all__ = ["Axis", "CopyConfig", "Launch", "Pair", "Part", "describe", "merged_axes", "plan", "power_in"]

WIDEST_WORD = 16
LINE_BYTES = 128  # a cache line of NVIDIA's and AMD's GPUs
MOST_PROGRAMS = 2**31 - 1  # CUDA's limit for the first axis of a grid


@dataclass(frozen=True)
class CopyConfig:
    """How much one program moves, and with how many threads.

    Args:
        elements_per_program: machine elements (of 8 bytes for words of 16 and 8 bytes, else the word); a power of two.
            With the default and 128 threads, a thread has four 16-byte loads under way before its first store.
        num_warps: warps of a program.
    """

    elements_per_program: int = 1024
    num_warps: int = 4

    def __post_init__(self) -> None:
        size = self.elements_per_program
        if size < 2 or size & (size - 1):
            raise ValueError(f"CopyConfig: elements_per_program must be a power of two from 2 up, got {size}")


class Pair(NamedTuple):
    """What a plan depends on. Strides are in elements; `alignment` divides both addresses (1, 2, 4, 8 or 16 bytes)."""

    itemsize: int
    shape: tuple[int, ...]
    source_stride: tuple[int, ...]
    destination_stride: tuple[int, ...]
    alignment: int


class Axis(NamedTuple):
    size: int
    source_stride: int
    destination_stride: int


class Part(NamedTuple):
    """One pair as the kernel takes it. Sizes and strides are in words.

    `sizes` and the stride tuples beside it are the axes other than the rows' and the columns', innermost first.
    """

    programs: int
    column_blocks: int
    columns: int
    rows: int
    source_row_stride: int
    destination_row_stride: int
    sizes: tuple[int, ...]
    source_strides: tuple[int, ...]
    destination_strides: tuple[int, ...]


class Launch(NamedTuple):
    """The pairs of one word width: `indices` says which of the pairs handed to `plan`, `parts` how each is copied.

    A block is `rows_per_program` rows by `columns_per_block` machine elements.
    """

    indices: tuple[int, ...]
    parts: tuple[Part, ...]
    programs: int
    word_bytes: int
    rows_per_program: int
    columns_per_block: int


def describe(source: Tensor, destination: Tensor) -> Pair:
    """The `Pair` of two tensors of one shape and dtype."""
    addresses = source.data_ptr() | destination.data_ptr()
    return Pair(source.element_size(), tuple(source.shape), source.stride(), destination.stride(), power_in(addresses))


@lru_cache(maxsize=1024)
def plan(pairs: tuple[Pair, ...], config: CopyConfig) -> tuple[Launch, ...]:
    """The launches that copy `pairs`: one for each word width among them, none for pairs without elements."""
    by_word: dict[int, list[tuple[int, list[Axis]]]] = {}
    for index, pair in enumerate(pairs):
        if 0 not in pair.shape:
            axes = merged_axes(pair)
            by_word.setdefault(_word_bytes(axes, pair.alignment), []).append((index, axes))
    return tuple(_launch(word, entries, config) for word, entries in by_word.items())


def power_in(number: int) -> int:
    """The largest power of two, at most `WIDEST_WORD`, that divides `number`."""
    number |= WIDEST_WORD
    return number & -number


def merged_axes(pair: Pair) -> list[Axis]:
    """The axes in bytes, innermost of the destination first, merged where both sides allow; the first is the row."""
    axes = [Axis(pair.itemsize, 1, 1)]
    given = [
        Axis(size, source * pair.itemsize, destination * pair.itemsize)
        for size, source, destination in zip(pair.shape, pair.source_stride, pair.destination_stride, strict=True)
        if size != 1
    ]
    for axis in sorted(given, key=lambda axis: axis.destination_stride):
        size, source_stride, destination_stride = axes[-1]
        if axis[1:] == (size * source_stride, size * destination_stride):
            axes[-1] = Axis(size * axis.size, source_stride, destination_stride)
        else:
            axes.append(axis)
    return axes


def _word_bytes(axes: Sequence[Axis], alignment: int) -> int:
    everything = alignment | axes[0].size
    for axis in axes[1:]:
        everything |= axis.source_stride | axis.destination_stride
    return power_in(everything)


def _launch(word: int, entries: Sequence[tuple[int, list[Axis]]], config: CopyConfig) -> Launch:
    unit = max(1, word // 8)  # machine elements in a word: Triton has no integer of 16 bytes
    # A block narrower than both its row and a cache line would leave parts of sectors to other programs.
    line = LINE_BYTES * unit // word
    columns = min(
        config.elements_per_program, max(min(line, _power_from(axes[0].size * unit // word)) for _, axes in entries)
    )
    candidates = []
    while columns <= config.elements_per_program:
        rows = config.elements_per_program // columns
        parts = tuple(_part(axes, word, rows, columns // unit) for _, axes in entries)
        candidates.append(
            Launch(tuple(i for i, _ in entries), parts, sum(part.programs for part in parts), word, rows, columns)
        )
        columns *= 2
    # All programs cost the same, so the fewest win; among equals the widest blocks, for longer runs of memory.
    best = min(candidates, key=lambda launch: (launch.programs, -launch.columns_per_block))
    if best.programs > MOST_PROGRAMS:
        raise ValueError(
            f"copy_parts: {best.programs} programs are more than a grid takes ({MOST_PROGRAMS}): split the call"
        )
    return best


def _power_from(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


def _part(axes: Sequence[Axis], word: int, rows_per_program: int, words_per_block: int) -> Part:
    columns = axes[0].size // word
    others = sorted(axes[1:], key=lambda axis: axis.size)
    rows = others.pop() if others else Axis(1, 0, 0)
    others.sort(key=lambda axis: axis.destination_stride)
    column_blocks = -(-columns // words_per_block)
    programs = column_blocks * -(-rows.size // rows_per_program)
    for axis in others:
        programs *= axis.size
    return Part(
        programs,
        column_blocks,
        columns,
        rows.size,
        rows.source_stride // word,
        rows.destination_stride // word,
        tuple(axis.size for axis in others),
        tuple(axis.source_stride // word for axis in others),
        tuple(axis.destination_stride // word for axis in others),
    )
