"""Activation checkpointing: what a collective received is saved, never received a second time.

`torch.utils.checkpoint` runs a region again in backward. In eager that repeats its collectives, on every rank alike.
In a compiled graph Dynamo tags the region's nodes, and AOTAutograd's partitioner copies tagged nodes into the backward
graph; a copied collective would need a token there is none of. So the tags of collectives are dropped before the
partitioner runs, by its configured pass over the joint graph.

Checked on torch 2.11 and 2.13; `compile_tests/test_pass_checkpoint.py` fails when the pass or the tags go away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["checkpoint_context_fn", "save_results"]


def checkpoint_context_fn() -> tuple[Any, Any]:
    """A ``context_fn`` for `torch.utils.checkpoint.checkpoint` that saves the results of collectives, nothing else.

    With it eager, too, issues each collective once: ``checkpoint(block, x, use_reentrant=False,
    context_fn=fvops.compiler.checkpoint_context_fn)``. Memory: the results of the region's collectives stay alive until
    its backward has run.
    """
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    from fvops.compiler import ordered_ops

    return CheckpointPolicy.MUST_SAVE if op in ordered_ops else CheckpointPolicy.PREFER_RECOMPUTE


def save_results() -> None:
    """Have AOTAutograd run our pass over joint graphs. Called at each trace: a program may have set its own since."""
    from torch._functorch import config

    found = config.joint_custom_pass
    if not isinstance(found, _SaveResults):
        config.joint_custom_pass = _SaveResults(found)


class _SaveResults:
    """Drops the tags of collectives and of the values read out of them; then the pass that was set before."""

    def __init__(self, then: Callable[..., Any] | None) -> None:
        self._then = then

    def __call__(self, joint: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        from fvops.compiler.token_chain import calls, results_of

        for call in calls(joint.graph):
            for node in (call, *results_of(call, token=True)):
                node.meta.pop("recompute", None)
        return joint if self._then is None else self._then(joint, inputs)
