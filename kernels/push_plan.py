"""What lies where in symmetric memory, and how a push into it is cut into programs: plain integers, no triton.

Every rank of a group has a buffer of one size that its peers can write to:

    words    64-bit, each in a line of its own: EPOCH, TICKET, WAITING, ABORT, then a FLAG for each source
    slot 0   results of the exchanges 0, 2, 4, ...
    slot 1   results of the exchanges 1, 3, 5, ...

A flag has one writer, the source; the other words are their owner's (ABORT: its host's). A slot holds the results of
one exchange one after another, each as the op returns it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fvops.kernels.parts_plan import CopyConfig, Launch, Pair, plan, power_in

__all__ = [
    "ABORT",
    "EPOCH",
    "FLAGS",
    "LINE_WORDS",
    "SLOTS",
    "TICKET",
    "WAITING",
    "PushLaunch",
    "Room",
    "buffer_bytes",
    "places_in_slot",
    "plan_push",
    "slot_bytes_for",
    "slots_start",
]

LINE_WORDS = 16  # a cache line of 128 bytes: words that different ranks write do not share one
EPOCH, TICKET, WAITING, ABORT, FLAGS = (LINE_WORDS * line for line in range(5))
SLOTS = 2
_ALIGNMENT = 128


@dataclass(frozen=True)
class Room:
    """One rank's view of a group's symmetric buffers.

    Args:
        words: this rank's words, int64, on the device.
        addresses: where each rank's buffer begins in this rank's address space, int64 ``[P]``, on the device.
        slots: this rank's slots, uint8, on the device.
        slot_bytes: size of a slot, a multiple of 128.
        place: this rank's place in the group.
    """

    words: Tensor
    addresses: Tensor
    slots: Tensor
    slot_bytes: int
    place: int

    @property
    def world_size(self) -> int:
        """How many ranks the group has."""
        return self.addresses.numel()


class PushLaunch(NamedTuple):
    """One launch of the push kernel: how one peer's parts are copied, and what tells the peers apart.

    `peers` has, for each part, the source's stride from peer to peer and where this rank's part lies in the peer's
    slot, in words of `copy.word_bytes`.
    """

    copy: Launch
    peers: tuple[tuple[int, int], ...]


def slots_start(world_size: int) -> int:
    """Byte offset of slot 0."""
    return 8 * (FLAGS + LINE_WORDS * world_size)


def buffer_bytes(world_size: int, slot_bytes: int) -> int:
    """Size of a rank's buffer."""
    return slots_start(world_size) + SLOTS * slot_bytes


def places_in_slot(sizes: Sequence[int]) -> list[int]:
    """Byte offsets of results of so many bytes in a slot."""
    return [slot_bytes_for(sizes[:i]) for i in range(len(sizes))]


def slot_bytes_for(sizes: Sequence[int]) -> int:
    """How large a slot has to be for results of so many bytes."""
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)


def plan_push(
    sources: Sequence[Tensor], outputs: Sequence[Tensor], offsets: Sequence[int], place: int, config: CopyConfig
) -> list[PushLaunch]:
    """The launches that push ``sources[i][j]`` to every peer j, where its result i shall lie.

    Args:
        sources: rank-major views ``[P, ...]`` of what is sent.
        outputs: rank-major views of the results, of the same shapes and dtypes, which lie alike on all ranks.
        offsets: byte offsets of the results in a slot.
        place: this rank's place, which is its index in the peers' results.
        config: how much a program moves.
    """
    pairs = []
    for source, output, offset in zip(sources, outputs, offsets, strict=True):
        size = source.element_size()
        own = offset + place * output.stride(0) * size
        aligned = power_in(source.data_ptr() | source.stride(0) * size | own)
        pairs.append(Pair(size, tuple(source.shape[1:]), source.stride()[1:], output.stride()[1:], aligned))
    launches = []
    for copy in plan(tuple(pairs), config):
        word = copy.word_bytes
        peers = tuple(
            (
                sources[i].stride(0) * pairs[i].itemsize // word,
                (offsets[i] + place * outputs[i].stride(0) * pairs[i].itemsize) // word,
            )
            for i in copy.indices
        )
        launches.append(PushLaunch(copy, peers))
    return launches
