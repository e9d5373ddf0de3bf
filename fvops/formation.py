"""Making torch's process groups for a coordinator, with errors that say which group it was and what is not there."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fvops.torch_compat import new_group

__all__ = ["process_groups"]


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


def _why() -> str:
    try:
        dist.distributed_c10d._get_default_store().check(["fvops/formation"])
    except RuntimeError:
        return (
            "the server of torch.distributed's store does not answer; it is torchrun's agent or, without torchrun, "
            "global rank 0 that has it"
        )
    return "a rank of the world has died, or makes no such group"
