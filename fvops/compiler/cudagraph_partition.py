"""Ops that no CUDA graph can hold: where they stand, Inductor ends one graph and begins another.

The tag `cudagraph_unsafe` would say so, but `with_effects` hides it; a configuration entry says it by name. Without it
a barrier is recognised only because its kernel has no tensor, hence is a CPU one.

Checked on torch 2.11 and 2.13; `compile_tests/test_internals.py` fails when the entry is no longer looked at.
"""

from __future__ import annotations

__all__ = ["HOST_OPS", "partition_at_host_ops"]

HOST_OPS = ("fvops::barrier",)


def partition_at_host_ops() -> None:
    """Name the host-side ops to Inductor. Called at each trace: a program may have replaced the list since."""
    from torch._inductor import config

    missing = [op for op in HOST_OPS if op not in config.custom_should_partition_ops]
    if missing:
        config.custom_should_partition_ops = [*config.custom_should_partition_ops, *missing]
