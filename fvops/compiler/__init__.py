"""What torch.compile has to be told about the ops, and the passes over their graphs (docs/compiler.md).

Everything that depends on compiler internals is in this package. It knows the ops by their overloads and nothing of
groups or transports. `install` runs at the first fake call of any op, that is when something is traced: importing
Inductor's lowerings costs a second, which eager programs do not pay.
"""

from __future__ import annotations

from typing import Any

from fvops.compiler.checkpointing import checkpoint_context_fn
from fvops.compiler.log import PassNote, pass_log
from fvops.compiler.switches import disable, enable, options

__all__ = [
    "PassNote",
    "checkpoint_context_fn",
    "disable",
    "enable",
    "install",
    "options",
    "ordered_ops",
    "pass_log",
]

# Overloads of the ops that communicate; `fvops.ops` fills it.
ordered_ops: list[Any] = []

_lowered = False


def install() -> None:
    """Register the Inductor lowerings once, and see to it that our configuration entries are in force."""
    global _lowered
    from fvops.compiler import backward, cache, checkpointing, cudagraph_partition, passes

    cache.salt_caches()
    cudagraph_partition.partition_at_host_ops()
    checkpointing.save_results()
    passes.take_slots()
    backward.compile_with_forward()
    if not _lowered:
        from fvops.compiler import absorb_lowering, ordered_lowering, overlap_lowering, shard_lowering

        ordered_lowering.register(ordered_ops)
        overlap_lowering.register()
        absorb_lowering.register()
        shard_lowering.register()
        _lowered = True
