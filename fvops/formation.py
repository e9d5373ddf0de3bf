"""Making groups: torch's process groups, and what their ranks settle; errors say which group and what is not there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fvops.torch_compat import new_group

__all__ = ["process_groups", "settling"]


def process_groups(ranks: list[int], backend: str, name: str, timeout_s: float) -> tuple[Any, Any]:
    """A process group of `backend` over the global `ranks`, and a gloo one. Collective over the world.

    Raises:
        RuntimeError: the store cannot be asked, or a rank did not come, within `timeout_s`.
    """
    deadline = timedelta(seconds=timeout_s)
    try:
        return new_group(ranks, backend, deadline), new_group(ranks, "gloo", deadline)
    except RuntimeError as error:  # torch's and gloo's, some of two words
        raise RuntimeError(
            f"group {name!r} of global ranks {ranks} could not be made (deadline {timeout_s:g} s): {_why()}. "
            f"Torch says: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


@contextlib.contextmanager
def settling(what: str, cpu_group: dist.ProcessGroup) -> Iterator[None]:
    """Around collectives over `cpu_group` in which its ranks settle something before they work together.

    Raises:
        RuntimeError: one failed: a rank has died, or did not come within the process group's deadline.
    """
    try:
        yield
    except RuntimeError as error:  # torch's and gloo's
        raise RuntimeError(
            f"the global ranks {dist.get_process_group_ranks(cpu_group)} could not settle {what}: {_why()}, or did not "
            f"come in time. Torch says: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def _why() -> str:
    try:
        dist.distributed_c10d._get_default_store().check(["fvops/formation"])
    except RuntimeError:
        return (
            "the server of torch.distributed's store does not answer; it is torchrun's agent or, without torchrun, "
            "global rank 0 that has it"
        )
    return "a rank of the world has died, or makes no such group"
