"""Which ranks share this node's memory: found by trying, not by comparing host names."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile

import torch
import torch.distributed as dist

from fvops.formation import settling
from fvops.stateless_process_group import StatelessProcessGroup
from fvops.torch_compat import all_gather_flat

__all__ = ["get_same_node_ranks", "is_the_same_node_as"]

_TOKEN_BYTES = 32
_SETTLED = "which of them share a node"


def is_the_same_node_as(pg: dist.ProcessGroup | StatelessProcessGroup, source_rank: int = 0) -> list[bool]:
    """One truth value per place in `pg`: does it share memory with place `source_rank`. Collective over `pg`.

    The source leaves a secret in a file of this node's shared memory (mode 0600, unguessable name); who can read the
    secret back is on its node.

    Raises:
        ValueError: `source_rank` is no place in `pg`, or `pg` is an NCCL group (it cannot carry CPU tensors).
        RuntimeError: the source has no shared memory to write to; raised on every rank.
    """
    own, places = _place(pg)
    if not 0 <= source_rank < places:
        raise ValueError(f"source_rank={source_rank} is not a place in the group; places are 0 to {places - 1}")
    # What is broadcast is the file's name and its content, both random.
    data = _broadcast(pg, secrets.token_bytes(2 * _TOKEN_BYTES), source_rank)
    failure = ""
    path = os.path.join(_shared_folder(), f"fvops-node-{data[:_TOKEN_BYTES].hex()}")
    try:
        if own == source_rank:
            try:
                _write(path, data[_TOKEN_BYTES:])
            except OSError as error:
                # The others are on their way to the barrier: go there too, and let the flags tell them.
                failure = f": {error}"
        _barrier(pg)
        everyone = _gather_flags(pg, _reads(path, data[_TOKEN_BYTES:]), places)
    finally:
        if own == source_rank:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    if not everyone[source_rank]:
        raise RuntimeError(
            f"place {source_rank} cannot read back its own file in {_shared_folder()}: "
            f"is that full or read-only?{failure}"
        )
    return everyone


def get_same_node_ranks(pg: dist.ProcessGroup | StatelessProcessGroup, source_rank: int = 0) -> list[int]:
    """Global ranks of `pg` that share memory with place `source_rank`. Collective; see `is_the_same_node_as`.

    A StatelessProcessGroup knows no global ranks: its own are returned.
    """
    flags = is_the_same_node_as(pg, source_rank)
    ranks = range(pg.world_size) if isinstance(pg, StatelessProcessGroup) else dist.get_process_group_ranks(pg)
    return [rank for rank, same in zip(ranks, flags, strict=True) if same]


def _place(pg: dist.ProcessGroup | StatelessProcessGroup) -> tuple[int, int]:
    """This rank's place and how many there are; ValueError for a group that cannot carry CPU tensors."""
    if isinstance(pg, StatelessProcessGroup):
        return pg.rank, pg.world_size
    if dist.get_backend(pg) in ("nccl", "hccl"):
        raise ValueError(f"is_the_same_node_as needs a group for CPU tensors (gloo), got {dist.get_backend(pg)}")
    return dist.get_rank(pg), dist.get_world_size(pg)


def _broadcast(pg: dist.ProcessGroup | StatelessProcessGroup, data: bytes, src: int) -> bytes:
    if isinstance(pg, StatelessProcessGroup):
        received = pg.broadcast_obj(data, src)
        if not isinstance(received, bytes) or len(received) != len(data):
            raise RuntimeError(f"rank {src} sent no secret of {len(data)} bytes")
        return received
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    with settling(_SETTLED, pg):
        dist.broadcast(buffer, src=dist.get_global_rank(pg, src), group=pg)
    return buffer.numpy().tobytes()


def _barrier(pg: dist.ProcessGroup | StatelessProcessGroup) -> None:
    if isinstance(pg, StatelessProcessGroup):
        pg.barrier()
    else:
        with settling(_SETTLED, pg):
            dist.barrier(group=pg)


def _gather_flags(pg: dist.ProcessGroup | StatelessProcessGroup, flag: bool, places: int) -> list[bool]:
    if isinstance(pg, StatelessProcessGroup):
        return [bool(other) for other in pg.all_gather_obj(flag)]
    everyone = torch.zeros(places, dtype=torch.uint8)
    with settling(_SETTLED, pg):
        all_gather_flat(everyone, torch.tensor([flag], dtype=torch.uint8), group=pg)
    return [bool(other) for other in everyone]


def _shared_folder() -> str:
    return "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()


def _write(path: str, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def _reads(path: str, content: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read() == content
    except OSError:
        return False
