"""How the ranks of a new communicator find each other: over a process group, or anything that can broadcast an object.

Only bytes are exchanged, a few of them, on the host.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
import torch.distributed as dist

__all__ = ["Bootstrap", "StatelessGroup"]


class StatelessGroup(Protocol):
    """What is needed of a group that is no ProcessGroup; `src` is a place in it."""

    rank: int
    world_size: int

    def broadcast_obj(self, obj: Any, src: int) -> Any: ...


class Bootstrap:
    """Rank, size and name of `group`, and an exchange of bytes over it.

    Args:
        group: a ProcessGroup that carries CPU tensors, None for the default one, or a `StatelessGroup`.
        refused: the process-group backend that is being replaced and cannot serve itself, ``"nccl"`` or ``"hccl"``.
        name: what messages call the group; default: its own name.

    Raises:
        ValueError: a ProcessGroup of the refused backend.
        TypeError: `group` is neither kind.
        RuntimeError: None, and torch.distributed is not initialised.
    """

    def __init__(self, group: dist.ProcessGroup | StatelessGroup | None, refused: str, name: str | None = None) -> None:
        if group is None:
            if not dist.is_initialized():
                raise RuntimeError(
                    "group=None means the default process group, but torch.distributed is not initialised"
                )
            group = cast(dist.ProcessGroup, dist.group.WORLD)
        self.group = group
        if isinstance(group, dist.ProcessGroup):
            if dist.get_backend(group) == refused:
                raise ValueError(f"needs a process group for CPU tensors (gloo) to start from, got a {refused} one")
            self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
            self.name = name or str(group.group_name)
        elif all(hasattr(group, name) for name in ("rank", "world_size", "broadcast_obj")):
            self.rank, self.world_size = group.rank, group.world_size
            self.name = name or str(getattr(group, "unique_name", f"stateless of {self.world_size}"))
        else:
            raise TypeError(
                "group must be a ProcessGroup, None, or have rank, world_size and broadcast_obj; "
                f"got {type(group).__name__}"
            )

    def broadcast(self, data: bytes, src: int, what: str) -> bytes:
        """`data` of place `src`; the others' must have as many bytes.

        Raises:
            RuntimeError: the exchange failed; names the group and `what` was exchanged.
        """
        try:
            if not isinstance(self.group, dist.ProcessGroup):
                received = self.group.broadcast_obj(data if self.rank == src else None, src)
            else:
                buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                dist.broadcast(buffer, src=dist.get_global_rank(self.group, src), group=self.group)
                received = buffer.numpy().tobytes()
        except RuntimeError as error:
            raise RuntimeError(f"exchanging {what} over group {self.name!r} failed: {error}") from error
        if not isinstance(received, bytes) or len(received) != len(data):
            raise RuntimeError(
                f"exchanging {what} over group {self.name!r}: expected {len(data)} bytes, got {received!r}"
            )
        return received

    def gather(self, text: str, what: str) -> list[str]:
        """The ranks' `text`s, cut to 255 bytes each."""
        own = text.encode()[:255]
        own = bytes([len(own)]) + own.ljust(255, b"\0")
        everyone = (self.broadcast(own, src, what) for src in range(self.world_size))
        return [data[1 : 1 + data[0]].decode(errors="replace") for data in everyone]
