"""What the ranks of a process group settle before they work together: numbers, and that all run the same fvops.

Ranks that run different fvops must not meet: their graphs would issue different collectives, and hang.
"""

from __future__ import annotations

import hashlib
import secrets

import torch
import torch.distributed as dist

from fvops import compiler
from fvops._version import __version__
from fvops.formation import settling
from fvops.torch_compat import all_gather_flat

__all__ = ["agree_on_max", "check_same_ops", "fingerprint", "fresh_number"]

_FINGERPRINT_BYTES = 128


def agree_on_max(number: int, cpu_group: dist.ProcessGroup) -> int:
    """The largest of the ranks' numbers, on every rank. Collective."""
    agreed = torch.tensor(number)
    with settling("a number", cpu_group):
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=cpu_group)
    return int(agreed)


def fresh_number(cpu_group: dist.ProcessGroup) -> int:
    """A number that all ranks get alike and no other call gets: it tells a group from earlier ones. Collective."""
    return agree_on_max(secrets.randbits(62), cpu_group)


def fingerprint() -> str:
    """The version and a digest of the op schemas of this process."""
    schemas = sorted(str(op._schema) for op in [*compiler.ordered_ops, torch.ops.fvops.shard.default])
    return f"fvops {__version__}, ops {hashlib.sha256(repr(schemas).encode()).hexdigest()[:16]}"


def check_same_ops(cpu_group: dist.ProcessGroup) -> None:
    """RuntimeError, on every rank, unless all ranks have the same fvops version and op schemas. Collective."""
    own = torch.zeros(_FINGERPRINT_BYTES, dtype=torch.uint8)
    text = fingerprint().encode()[:_FINGERPRINT_BYTES]
    own[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    everyone = torch.zeros(dist.get_world_size(cpu_group) * _FINGERPRINT_BYTES, dtype=torch.uint8)
    with settling("whether all run the same fvops", cpu_group):
        all_gather_flat(everyone, own, group=cpu_group)
    found = [bytes(row.tolist()).rstrip(b"\0").decode() for row in everyone.view(-1, _FINGERPRINT_BYTES)]
    if len(set(found)) > 1:
        listed = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(found))
        raise RuntimeError(f"ranks run different versions of fvops, install the same one everywhere: {listed}")
