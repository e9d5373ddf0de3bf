"""Which ranks share this node's memory: found by trying, not by comparing host names."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile

import torch
import torch.distributed as dist

from fvops.torch_compat import all_gather_flat

__all__ = ["get_same_node_ranks", "is_the_same_node_as"]

_TOKEN_BYTES = 32


def is_the_same_node_as(pg: dist.ProcessGroup, source_rank: int = 0) -> list[bool]:
    """One truth value per place in `pg`: does it share memory with place `source_rank`. Collective over `pg`.

    The source leaves a secret in a file of this node's shared memory (mode 0600, unguessable name); who can read the
    secret back is on its node.

    Raises:
        ValueError: `source_rank` is no place in `pg`, or `pg` is an NCCL group (it cannot carry CPU tensors).
        RuntimeError: the source has no shared memory to write to; raised on every rank.
    """
    if dist.get_backend(pg) in ("nccl", "hccl"):
        raise ValueError(f"is_the_same_node_as needs a group for CPU tensors (gloo), got {dist.get_backend(pg)}")
    ranks = dist.get_process_group_ranks(pg)
    if not 0 <= source_rank < len(ranks):
        raise ValueError(f"source_rank={source_rank} is not a place in the group; places are 0 to {len(ranks) - 1}")
    own = dist.get_rank(pg)
    # What is broadcast is the file's name and its content, both random.
    secret = torch.zeros(2 * _TOKEN_BYTES, dtype=torch.uint8)
    if own == source_rank:
        secret = torch.frombuffer(bytearray(secrets.token_bytes(2 * _TOKEN_BYTES)), dtype=torch.uint8)
    dist.broadcast(secret, src=ranks[source_rank], group=pg)
    data = secret.numpy().tobytes()
    failure = ""
    path = os.path.join(_shared_folder(), f"fvops-node-{data[:_TOKEN_BYTES].hex()}")
    try:
        if own == source_rank:
            try:
                _write(path, data[_TOKEN_BYTES:])
            except OSError as error:
                # The others are on their way to the barrier: go there too, and let the flags tell them.
                failure = f": {error}"
        dist.barrier(group=pg)
        same = torch.tensor([_reads(path, data[_TOKEN_BYTES:])], dtype=torch.uint8)
        everyone = torch.zeros(len(ranks), dtype=torch.uint8)
        all_gather_flat(everyone, same, group=pg)
    finally:
        if own == source_rank:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    if not everyone[source_rank]:
        raise RuntimeError(
            f"place {source_rank} cannot read back its own file in {_shared_folder()}: "
            f"is that full or read-only?{failure}"
        )
    return [bool(flag) for flag in everyone]


def get_same_node_ranks(pg: dist.ProcessGroup, source_rank: int = 0) -> list[int]:
    """Global ranks of `pg` that share memory with place `source_rank`. Collective; see `is_the_same_node_as`."""
    flags = is_the_same_node_as(pg, source_rank)
    return [rank for rank, same in zip(dist.get_process_group_ranks(pg), flags, strict=True) if same]


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
