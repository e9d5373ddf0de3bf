"""Setting up symmetric buffers, unanimously: every rank of a group gets them, or none does and all know why."""

from __future__ import annotations

import torch
import torch.distributed as dist

from fvops.device_communicators.symmetric_buffer import SymmetricBuffer
from fvops.formation import settling
from fvops.torch_compat import all_gather_flat

__all__ = ["agree", "form_buffers"]

_MESSAGE_BYTES = 512


def agree(cpu_group: dist.ProcessGroup, refusal: str) -> str:
    """The first refusal among the ranks', with the place that gave it; empty if all of them are. Collective."""
    own = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
    text = refusal.encode()[:_MESSAGE_BYTES]
    if text:
        own[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    everyone = torch.zeros(dist.get_world_size(cpu_group) * _MESSAGE_BYTES, dtype=torch.uint8)
    with settling("a transport over symmetric memory", cpu_group):
        all_gather_flat(everyone, own, group=cpu_group)
    for place, row in enumerate(everyone.view(-1, _MESSAGE_BYTES)):
        found = bytes(row.tolist()).rstrip(b"\0").decode(errors="replace")
        if found:
            return f"place {place}: {found}"
    return ""


def form_buffers(
    kind: type[SymmetricBuffer],
    cpu_group: dist.ProcessGroup,
    device: torch.device,
    slot_bytes: int,
    deadline_s: float,
) -> tuple[SymmetricBuffer | None, str]:
    """Connected buffers with slots of `slot_bytes`, or None and why not, alike on all ranks. Collective.

    The ranks agree after each step that can fail on one of them, so that nobody enters the next one alone.
    """
    buffer, refusal = None, ""
    try:
        buffer = kind(cpu_group, device, slot_bytes)
    except (RuntimeError, OSError) as error:
        refusal = f"no symmetric memory for slots of {slot_bytes} bytes: {error}"
    refusal = agree(cpu_group, refusal)
    if buffer is None or refusal:
        return None, refusal
    try:
        buffer.connect(deadline_s)
    except (RuntimeError, OSError) as error:
        refusal = f"the peers' symmetric memory cannot be mapped: {error}"
    refusal = agree(cpu_group, refusal)
    return (None, refusal) if refusal else (buffer, "")
