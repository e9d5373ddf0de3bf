"""Setting up a group's segments, unanimously: every rank gets all of them, or none does and all know why.

The files never have a name (`unnamed_file`): their addresses travel over the group's gloo connections, only their
owner's user may open them (mode 0600), and the kernel frees them with the last process. Whether ranks share memory is
found by trying to open them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from fvops.device_communicators.shm import futex, unnamed_file
from fvops.device_communicators.shm.peers import Peer
from fvops.device_communicators.shm.segment import Segment, reserve
from fvops.device_communicators.shm.segment_layout import PAGE, SLOTS, SegmentLayout, round_up
from fvops.formation import settling
from fvops.torch_compat import all_gather_flat

__all__ = ["Formation", "form_segments"]

_MESSAGE_BYTES = 1024
_MOST_PLACES = 64
# All of a segment's slots for collectives together. Large slots mean few waits, and must still fit in cache.
_SLOTS_BYTES = 4 << 20


@dataclass
class Formation:
    """A group's segments as one rank has them; `descriptor` is its own segment's open file."""

    segments: list[Segment]
    peers: dict[int, Peer]
    descriptor: int


def form_segments(
    cpu_group: dist.ProcessGroup, refusal: str, segment_bytes: int, slot_bytes: int | None, folder: str
) -> tuple[Formation | None, str]:
    """The segments of all ranks of `cpu_group`, or None; and what was set up, or why not. Collective over gloo.

    Args:
        refusal: why this rank wants none; empty if it does.
        segment_bytes: size of each segment.
        slot_bytes: size of a channel's slot; default by the number of ranks.
        folder: a tmpfs; one that differs stands for another node.
    """
    me, places = dist.get_rank(cpu_group), dist.get_world_size(cpu_group)
    if places == 1:
        return None, "a group of one has nobody to exchange with"
    layout = SegmentLayout(
        places, slot_bytes or _SLOTS_BYTES // (SLOTS * places) // 64 * 64, round_up(segment_bytes, PAGE)
    )
    refusal = refusal or _unfit(layout, folder)
    with contextlib.ExitStack() as undo:
        offer: dict[str, Any] = {}
        descriptor = -1
        if not refusal:
            descriptor, refusal, offer = _make(folder, layout)
        if descriptor >= 0:
            undo.callback(os.close, descriptor)
        announced = _tell(cpu_group, {"refusal": refusal} | offer)
        reasons = [_reason(place, other, layout) for place, other in enumerate(announced)]
        formation, refusal = None, next(filter(None, reasons), "")
        if not refusal:
            formation, refusal = _open_all(me, announced, layout, folder, descriptor)
        if formation is not None:
            for peer in formation.peers.values():
                undo.callback(peer.close)
        # Also the moment at which all have opened what they need: until then each holds its file open.
        found = [str(other["refusal"]) for other in _tell(cpu_group, {"refusal": refusal})]
        if any(found):
            return None, next(filter(None, found))
        undo.pop_all()
    mb = layout.segment_bytes / 2**20
    return formation, f"shared memory, {places} segments of up to {mb:g} MB in {folder}"


def _unfit(layout: SegmentLayout, folder: str) -> str:
    """Why this rank cannot take part, as far as it can tell alone."""
    if layout.places > _MOST_PLACES:
        return f"{layout.places} ranks are more than the {_MOST_PLACES} that share memory"
    if not os.path.isdir(folder):
        return f"there is no {folder}"
    if layout.segment_bytes <= layout.pool_start:
        return (
            f"a segment of {layout.segment_bytes} bytes (FVOPS_SHM_SEGMENT_MB) is below the {layout.pool_start} bytes "
            f"that {layout.places} ranks need"
        )
    return futex.unsupported()


def _make(folder: str, layout: SegmentLayout) -> tuple[int, str, dict[str, Any]]:
    """Create the segment's file, its control area and slots allocated, and what others need to open it; or why not."""
    try:
        descriptor = unnamed_file.create(folder)
    except OSError as error:
        return -1, f"no file can be created in {folder}: {error}", {}
    offer: dict[str, Any] = {}
    try:
        os.ftruncate(descriptor, layout.segment_bytes)
        refusal = reserve(descriptor, 0, layout.pool_start, considerate=True)
        offer = {"layout": asdict(layout), "address": asdict(unnamed_file.address_of(descriptor, folder))}
    except OSError as error:
        refusal = f"a file cannot be set up: {error}"
    if refusal:
        os.close(descriptor)
        return -1, f"{folder}: {refusal}", {}
    return descriptor, "", offer


def _tell(cpu_group: dist.ProcessGroup, message: dict[str, Any]) -> list[dict[str, Any]]:
    """All ranks' messages, by place."""
    text = json.dumps(message).encode()
    if len(text) > _MESSAGE_BYTES:
        text = json.dumps({"refusal": str(message["refusal"])[: _MESSAGE_BYTES // 8]}).encode()
    own = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
    own[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    everyone = torch.zeros(dist.get_world_size(cpu_group) * _MESSAGE_BYTES, dtype=torch.uint8)
    with settling("a transport over shared memory", cpu_group):
        all_gather_flat(everyone, own, group=cpu_group)
    return [json.loads(bytes(row.tolist()).rstrip(b"\0")) for row in everyone.view(-1, _MESSAGE_BYTES)]


def _reason(place: int, other: dict[str, Any], layout: SegmentLayout) -> str:
    if other["refusal"]:
        return f"place {place}: {other['refusal']}"
    if other["layout"] != asdict(layout):
        return f"place {place} wants another layout, {other['layout']} instead of {asdict(layout)}"
    return ""


def _open_all(
    me: int, announced: Sequence[dict[str, Any]], layout: SegmentLayout, folder: str, descriptor: int
) -> tuple[Formation | None, str]:
    formation = Formation([], {}, descriptor)
    for place, other in enumerate(announced):
        try:
            if place == me:
                formation.segments.append(Segment(descriptor, layout))
                continue
            address = unnamed_file.Address(**other["address"])
            formation.segments.append(_open(address, layout, folder))
            formation.peers[place] = Peer(address.maker)
        except FileNotFoundError:
            refusal = f"places {me} and {place} are on different nodes"
        except (OSError, RuntimeError) as error:
            refusal = f"place {me} cannot reach place {place}: {error}"
        else:
            continue
        for peer in formation.peers.values():
            peer.close()
        return None, refusal
    return formation, ""


def _open(address: unnamed_file.Address, layout: SegmentLayout, folder: str) -> Segment:
    descriptor = unnamed_file.open_other(address, folder, layout.segment_bytes)
    try:
        return Segment(descriptor, layout)
    finally:
        os.close(descriptor)
