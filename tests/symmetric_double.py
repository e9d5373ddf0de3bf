"""The symmetric memory of the GPU exchange, on CPU ranks: shared memory, and kernels under Triton's interpreter.

`TRITON_INTERPRET` is read when triton decorates a kernel, so the kernels are imported through `interpreted` here. What
runs is the code that GPUs get, in processes that really race; what cannot be seen is a GPU's memory ordering.
"""

from __future__ import annotations

import mmap
import os
import secrets
import time
import weakref
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["SharedBuffer", "delays", "interpreted"]

_NAME_BYTES = 32
_SHARED = "/dev/shm"
_NAP_S = 0.0002


def interpreted() -> Any:
    """The module `fvops.kernels.push`, its kernels interpreted; one that waits leaves its core to the others."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        from fvops.kernels import push, signals
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    kind = type(push._push).__name__
    if kind != "InterpretedFunction":
        raise RuntimeError(f"the push kernel was imported before, as {kind}, and would not be interpreted")
    if not isinstance(signals._read, _Polite):
        signals._read = _Polite(signals._read)
    return push


class _Polite:
    """What reads a signal, with a nap after: more ranks than cores would otherwise spin through whole time slices."""

    def __init__(self, read: Any) -> None:
        self._read = read

    def __call__(self, word: Any) -> Any:
        value = self._read(word)
        time.sleep(_NAP_S)
        return value


class SharedBuffer:
    """`SymmetricBuffer` over a file that all ranks map, with settings for what a test wants to go wrong.

    Attributes:
        refuses: the text that `refusal` gives on this rank.
        most_bytes: a larger buffer cannot be allocated on this rank.
    """

    refuses = ""
    most_bytes = 1 << 40

    def __init__(self, cpu_group: dist.ProcessGroup, device: torch.device, slot_bytes: int) -> None:
        from fvops.kernels.push_plan import buffer_bytes

        self._group, self._slot_bytes = cpu_group, slot_bytes
        self._size = buffer_bytes(dist.get_world_size(cpu_group), slot_bytes)
        if self._size > self.most_bytes:
            raise RuntimeError(f"no room for {self._size} bytes")
        self._name = secrets.token_hex(_NAME_BYTES // 2)
        with open(self._path(self._name), "xb") as file:
            file.truncate(self._size)
        # Also where the ranks do not agree, and nobody connects.
        self._unlink = weakref.finalize(self, os.unlink, self._path(self._name))

    @classmethod
    def refusal(cls, device: torch.device) -> str:
        return cls.refuses

    def connect(self, deadline_s: float) -> None:
        from fvops.kernels.push_plan import Room, slots_start

        P, place = dist.get_world_size(self._group), dist.get_rank(self._group)
        own = torch.frombuffer(bytearray(self._name.encode()), dtype=torch.uint8)
        names = [torch.empty_like(own) for _ in range(P)]
        dist.all_gather(names, own, group=self._group)
        self._mapped = [self._map(bytes(name.tolist()).decode()) for name in names]
        dist.barrier(self._group)
        self._unlink()
        start, memory = slots_start(P), self._mapped[place]
        addresses = torch.tensor([buffer.data_ptr() for buffer in self._mapped])
        self.room = Room(memory[:start].view(torch.int64), addresses, memory[start:], self._slot_bytes, place)

    def read_words(self, deadline_s: float) -> list[int]:
        return self.room.words.tolist()

    def abort(self, deadline_s: float) -> None:
        from fvops.kernels.push_plan import ABORT

        self.room.words[ABORT] = 1

    @staticmethod
    def _path(name: str) -> str:
        return os.path.join(_SHARED, f"fvops-test-{name}")

    def _map(self, name: str) -> torch.Tensor:
        with open(self._path(name), "r+b") as file:
            return torch.frombuffer(mmap.mmap(file.fileno(), self._size), dtype=torch.uint8)


def delays(seed: int, most_s: float) -> Any:
    """A function that sleeps for a random time, often none: ranks that call it drift apart.

    Meant to provoke: a missing signal between ranks shows where one is late. No test passes because of a delay.
    """
    generator = torch.Generator().manual_seed(seed)

    def sleep() -> None:
        draw = float(torch.rand(1, generator=generator))
        if draw > 0.5:
            time.sleep(most_s * (draw - 0.5))

    return sleep
