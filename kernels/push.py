"""The one-sided exchange in Triton: every rank writes its strided slices straight into its peers' results.

One launch packs, sends and lays down: each program reads a block of what one peer shall get and stores it in that
peer's slot, at the place and with the strides of the result. The launch ends when all peers' data is here
(`signals.meet`); a second one copies the slot into the caller's tensors. Several tensors (q, k and v) go in one launch
if they are equally well aligned (see `parts_plan`); of more launches the last one signals.

Against a packed exchange over NCCL this spares the packing, the unpacking at B > 1 and the copy through NCCL's own
buffers, and costs the copy out of the slot; what that is worth is not measured yet.

Importing this module needs triton. Nothing is allocated, nothing waits on the host and no argument changes from call to
call, so a CUDA graph can hold an exchange.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fvops.kernels import signals
from fvops.kernels.parts_copy import DEFAULT_CONFIG, MACHINE_ELEMENT, CopyConfig, copy_block
from fvops.kernels.parts_plan import power_in
from fvops.kernels.parts_torch import check_pairs
from fvops.kernels.push_plan import Room, places_in_slot, plan_push, slot_bytes_for, slots_start

__all__ = ["exchange", "push_calls", "take_calls"]


@triton.jit
def _push_block(
    program: tl.tensor,
    programs: tl.tensor,
    source: tl.tensor,
    part: tl.tuple,
    addresses: tl.tensor,
    place: tl.tensor,
    slot: tl.tensor,
    WORLD: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Move one block of one pair to one peer: the next rank first, so that at any time each rank is written by one."""
    peer = (place + 1 + program // programs) % WORLD
    peer_stride, own_offset = part[2]
    destination = tl.load(addresses + peer).to(tl.pointer_type(source.dtype.element_ty))
    destination = tl.multiple_of(destination, 16)
    copy_block(
        program % programs,
        source + peer.to(tl.int64) * peer_stride * UNIT,
        destination + (slot + own_offset) * UNIT,
        part,
        UNIT,
        ROWS,
        COLUMNS,
    )


@triton.jit(do_not_specialize=["programs", "parts", "place", "slots", "slot_words"])
def _push(
    words: tl.tensor,
    addresses: tl.tensor,
    sources: tl.tuple,
    programs: tl.tuple,
    parts: tl.tuple,
    place: tl.tensor,
    slots: tl.tensor,
    slot_words: tl.tensor,
    WORLD: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIGNAL: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    slot = slots + (signals.epoch(words) % 2) * slot_words
    void = signals.aborted(words)
    first = 0
    for i in tl.static_range(len(sources)):
        last = first + programs[i] * WORLD
        if (program >= first) & (program < last) & (not void):
            _push_block(
                program - first,
                programs[i],
                sources[i],
                parts[i],
                addresses,
                place,
                slot,
                WORLD,
                UNIT,
                ROWS,
                COLUMNS,
            )
        first = last
    if SIGNAL:
        signals.meet(words, addresses, place, WORLD)


@triton.jit(do_not_specialize=["programs", "counts", "offsets", "slot_words"])
def _take(
    words: tl.tensor,
    slots: tl.tensor,
    destinations: tl.tuple,
    programs: tl.tuple,
    counts: tl.tuple,
    offsets: tl.tuple,
    slot_words: tl.tensor,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Copy what exchange EPOCH - 1 left in its slot; all ones, which is NaN in every float, if it was aborted."""
    program = tl.program_id(0)
    slot = ((signals.epoch(words) + 1) % 2) * slot_words
    void = signals.aborted(words)
    first = 0
    for i in tl.static_range(len(destinations)):
        if (program >= first) & (program < first + programs[i]):
            column = (program - first).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = column < counts[i].to(tl.int64) * UNIT
            value = tl.load(slots + (slot + offsets[i]) * UNIT + column, mask & (not void), other=-1)
            tl.store(destinations[i] + column, value, mask)
        first += programs[i]


def exchange(
    room: Room, outputs: Sequence[Tensor], inputs: Sequence[Tensor], config: CopyConfig = DEFAULT_CONFIG
) -> None:
    """``inputs[i][j]`` goes to peer j, ``outputs[i][j]`` comes from it; for all i in one exchange. Collective.

    Args:
        room: memory in which the results fit, see `push_plan.slot_bytes_for`.
        outputs: rank-major views ``[P, ...]`` of results without gaps, alike on all ranks.
        inputs: rank-major views of the same shapes and dtypes, of any strides.

    Raises:
        ValueError, TypeError: from `check_pairs`; a result has gaps, or they do not fit.
    """
    check_pairs(inputs, outputs)
    needed = slot_bytes_for(_sizes(outputs))
    if needed > room.slot_bytes:
        raise ValueError(f"push.exchange: results of {needed} bytes do not fit into a slot of {room.slot_bytes} bytes")
    device = room.words.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for programs, arguments, keywords in push_calls(room, outputs, inputs, config):
            _push[(programs,)](*arguments, **keywords)
        for programs, arguments, keywords in take_calls(room, outputs, config):
            _take[(programs,)](*arguments, **keywords)


def push_calls(
    room: Room, outputs: Sequence[Tensor], inputs: Sequence[Tensor], config: CopyConfig
) -> Iterator[tuple[int, tuple[Any, ...], dict[str, Any]]]:
    """The push kernel's calls: grid size, arguments and keywords of each; none where there is nothing to move."""
    offsets = places_in_slot(_sizes(outputs))
    launches = plan_push(inputs, outputs, offsets, room.place, config)
    for number, (copy, peers) in enumerate(launches):
        element, word = MACHINE_ELEMENT[copy.word_bytes], copy.word_bytes
        yield (
            room.world_size * copy.programs,
            (
                room.words,
                room.addresses,
                tuple(triton.reinterpret(inputs[i], element) for i in copy.indices),
                tuple(part.programs for part in copy.parts),
                tuple((part[1:6], part[6:], peer) for part, peer in zip(copy.parts, peers, strict=True)),
                room.place,
                slots_start(room.world_size) // word,
                room.slot_bytes // word,
            ),
            {
                "WORLD": room.world_size,
                "UNIT": max(1, word // 8),
                "ROWS": copy.rows_per_program,
                "COLUMNS": copy.columns_per_block,
                "SIGNAL": number == len(launches) - 1,
                "num_warps": config.num_warps,
            },
        )


def take_calls(
    room: Room, outputs: Sequence[Tensor], config: CopyConfig
) -> Iterator[tuple[int, tuple[Any, ...], dict[str, Any]]]:
    """The calls that copy the results out of the slot, as `push_calls`: one for each word width."""
    flats = [_flat(output) for output in outputs]
    offsets = places_in_slot(_sizes(flats))
    by_word: dict[int, list[int]] = {}
    for i, flat in enumerate(flats):
        if flat.numel():
            by_word.setdefault(power_in(flat.data_ptr() | flat.numel()), []).append(i)
    for word, indices in by_word.items():
        unit, block = max(1, word // 8), config.elements_per_program
        counts = tuple(flats[i].numel() // word for i in indices)
        programs = tuple(-(-count * unit // block) for count in counts)
        element = MACHINE_ELEMENT[word]
        yield (
            sum(programs),
            (
                room.words,
                triton.reinterpret(room.slots, element),
                tuple(triton.reinterpret(flats[i], element) for i in indices),
                programs,
                counts,
                tuple(offsets[i] // word for i in indices),
                room.slot_bytes // word,
            ),
            {"UNIT": unit, "BLOCK": block, "num_warps": config.num_warps},
        )


def _sizes(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.numel() * tensor.element_size() for tensor in tensors]


def _flat(view: Tensor) -> Tensor:
    """The memory of a result as bytes; `view` shows all of it, its dims in any order."""
    expected = 1
    for stride, size in sorted(zip(view.stride(), view.shape, strict=True)):
        if size > 1 and stride != expected and view.numel():
            raise ValueError(f"push.exchange: a result has gaps: shape {tuple(view.shape)}, strides {view.stride()}")
        expected *= size
    return view.as_strided((view.numel(),), (1,)).view(torch.uint8)
