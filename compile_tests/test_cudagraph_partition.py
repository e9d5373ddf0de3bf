"""Where Inductor cuts a graph for CUDA graphs: at a barrier, with the collectives before and after it in order."""

from __future__ import annotations

import torch
from torch import Tensor

import fvops
from fvops.debug import canonical, record_collectives
from tests.harness import Ranks


def _with_barrier(x: Tensor) -> Tensor:
    group = fvops.get_sp_group()
    y = group.all_reduce(x.sin())
    group.barrier()
    return group.all_gather(y * 2) + 1


def _compile_and_watch() -> tuple[list[tuple[str, str]], list[str], bool]:
    """For each fvops kernel the reason to cut there, as the scheduler has it; and what the compiled program issued."""
    from torch._inductor import config, scheduler

    reasons = []
    decide = scheduler.Scheduler.should_partition

    def watched(self: object, node: scheduler.BaseSchedulerNode, *args: object) -> str | None:
        reason = decide(self, node, *args)
        op = getattr(node.node, "op_overload", None)
        if op is not None and op.namespace == "fvops":
            reasons.append((op._opname, str(reason)))
        return reason

    x = torch.ones(4)
    scheduler.Scheduler.should_partition = watched
    try:
        with config.patch({"triton.cudagraphs": True, "graph_partition": True}):
            compiled = torch.compile(_with_barrier, fullgraph=True)
            with record_collectives() as records:
                y = compiled(x)
    finally:
        scheduler.Scheduler.should_partition = decide
    return reasons, [op for _, op, _ in canonical(records)], torch.allclose(y, _with_barrier(x))


def test_a_graph_is_cut_at_a_barrier_and_keeps_its_order(two_ranks: Ranks) -> None:
    for reasons, issued, same in two_ranks.run(_compile_and_watch, deadline_s=200):
        by_op = dict(reasons)
        assert by_op["barrier"].startswith("custom partition op")
        # On a GPU these two would be captured: nothing but their being on CPU here cuts at them.
        assert {by_op["all_reduce"], by_op["all_gather"]} == {"cpu ops"}
        assert issued == ["all_reduce", "barrier", "all_gather"]
        assert same
