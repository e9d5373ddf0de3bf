"""The memory of the one-sided exchange on GPUs: one buffer a rank, which all ranks of the group can write to.

`TorchSymmetricBuffer` is torch's symmetric memory on CUDA. The transport knows only `SymmetricBuffer`, so that the
tests can run it over other memory.
"""

from __future__ import annotations

import time
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fvops.device_communicators.library_watchdog import bounded
from fvops.kernels.push_plan import ABORT, Room, buffer_bytes, slots_start
from fvops.torch_compat import symmetric_empty, symmetric_rendezvous

__all__ = ["SymmetricBuffer", "TorchSymmetricBuffer"]

_POLL_S = 0.001


class SymmetricBuffer(Protocol):
    """A group's buffers as one rank has them: made on every rank, then connected on every rank.

    Attributes:
        room: what the kernels need; there once connected.
    """

    room: Room

    def __init__(self, cpu_group: dist.ProcessGroup, device: torch.device, slot_bytes: int) -> None:
        """Allocate this rank's buffer, its words zero. Not collective; RuntimeError or OSError when it cannot."""

    @staticmethod
    def refusal(device: torch.device) -> str:
        """Why there is no such memory on `device`, as far as this rank can tell alone; empty if there is."""

    def connect(self, deadline_s: float) -> None:
        """Map the peers' buffers. Collective; RuntimeError or OSError when it cannot."""

    def read_words(self, deadline_s: float) -> list[int]:
        """This rank's words, read from the host while the device may be at work.

        Raises:
            RuntimeError: the device did not answer in time.
        """

    def abort(self, deadline_s: float) -> None:
        """Set the ABORT word from the host: whatever waits on the device gives up. Raises as `read_words`."""


class TorchSymmetricBuffer:
    """`SymmetricBuffer` over ``torch.distributed._symmetric_memory`` on CUDA; run with torch 2.11."""

    room: Room

    def __init__(self, cpu_group: dist.ProcessGroup, device: torch.device, slot_bytes: int) -> None:
        self._group = cpu_group
        self._device = device
        self._slot_bytes = slot_bytes
        self._memory = symmetric_empty(buffer_bytes(dist.get_world_size(cpu_group), slot_bytes), device)
        self._memory.zero_()
        torch.cuda.synchronize(device)
        self._side = torch.cuda.Stream(device)
        # Made now: the watchdog's thread allocates nothing while another one captures.
        self._seen = torch.empty(slots_start(dist.get_world_size(cpu_group)) // 8, dtype=torch.int64, pin_memory=True)
        self._one = torch.ones(1, dtype=torch.int64).pin_memory()

    @staticmethod
    def refusal(device: torch.device) -> str:
        if device.type != "cuda":
            return f"symmetric memory is for CUDA tensors, not {device.type}"
        if torch.version.hip is not None:
            return "symmetric memory was not tried on ROCm"
        return ""

    def connect(self, deadline_s: float) -> None:
        def rendezvous() -> None:
            with torch.cuda.device(self._device):
                self._handle = symmetric_rendezvous(self._memory, self._group)

        # torch waits for the peers' descriptors without a deadline.
        if not bounded("fvops symmetric memory", rendezvous, deadline_s):
            raise RuntimeError(f"torch's rendezvous of symmetric memory did not return within {deadline_s:g} s")
        P, place = dist.get_world_size(self._group), dist.get_rank(self._group)
        addresses, start = list(self._handle.buffer_ptrs), slots_start(P)
        if len(addresses) != P or 0 in addresses or addresses[place] != self._memory.data_ptr():
            raise RuntimeError(
                f"torch's symmetric memory gave the addresses {list(map(hex, addresses))} for {P} ranks; number "
                f"{place} should be this rank's own, {hex(self._memory.data_ptr())}"
            )
        self.room = Room(
            words=self._memory[:start].view(torch.int64),
            addresses=torch.tensor(addresses, device=self._device),
            slots=self._memory[start:],
            slot_bytes=self._slot_bytes,
            place=place,
        )
        torch.cuda.synchronize(self._device)

    def read_words(self, deadline_s: float) -> list[int]:
        self._copy(self._seen, self.room.words, deadline_s)
        return self._seen.tolist()

    def abort(self, deadline_s: float) -> None:
        self._copy(self.room.words[ABORT : ABORT + 1], self._one, deadline_s)

    def _copy(self, target: Tensor, source: Tensor, deadline_s: float) -> None:
        """Copy beside whatever the device is doing, waiting with a deadline."""
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._side)
        until = time.monotonic() + deadline_s
        while not event.query():
            if time.monotonic() > until:
                raise RuntimeError(f"a copy of {source.numel()} words beside the kernels took over {deadline_s:g} s")
            time.sleep(_POLL_S)
