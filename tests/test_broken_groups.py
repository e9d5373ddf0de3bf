"""After a failure a group says so at every call, whatever its transport, and the process can start over."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch

from tests import harness
from tests.harness import Ranks
from tests.refusal import refusal
from tests.worlds import tear_down

TRANSPORTS = ["shm", "process_group", "nccl", "hccl"]
CALLS: dict[str, Any] = {
    "all_reduce": lambda g: g.all_reduce(torch.ones(3)),
    "send": lambda g: g.send(torch.ones(3)),
    "recv": lambda g: g.recv((3,), torch.float32),
    "barrier": lambda g: g.barrier(),
    "broadcast_object": lambda g: g.broadcast_object("x"),
    "send_object": lambda g: g.send_object("x", (g.rank_in_group + 1) % g.world_size),
}


def _fail_and_start_over() -> list[Any]:
    """The last rank does not come to an all_gather with a deadline of 2 s of its own; then all begin anew."""
    import torch.distributed as dist

    import fvops
    from fvops.parallel_state import init_model_parallel_group

    harness.init_fvops(suffix="a")
    P = fvops.get_world_size()
    group = init_model_parallel_group([list(range(P))], 0, "gloo", group_name="brief", timeout_s=2.0)
    assert fvops.get_sp_group().timeout_s == 300.0
    store, last = dist.distributed_c10d._get_default_store(), group.rank_in_group == P - 1
    texts = []
    group.all_reduce(torch.ones(3))
    if not last:
        texts.append(refusal(lambda: group.all_gather(torch.ones(4))))
        texts += [refusal(lambda call=call: call(group)) for call in CALLS.values()]
        store.set(f"told/{group.rank_in_group}", "")
    # The last one stays until all have told: a connection that goes away would be another failure.
    store.wait([f"told/{place}" for place in range(P - 1)], timedelta(seconds=60))
    # Another group is as good as before.
    total = fvops.get_sp_group().all_reduce(torch.ones(2)).tolist()
    fvops.cleanup_dist_env_and_memory()
    harness.init_fvops(suffix="b")
    group = init_model_parallel_group([list(range(P))], 0, "gloo", group_name="brief")
    name, again = group.unique_name, group.all_gather(torch.ones(1), 0).tolist()
    tear_down()
    return [texts, total, name, again]


@pytest.mark.parametrize(
    ("world_size", "transport"),
    [
        pytest.param(
            P, transport, marks=() if (P, transport) in ((2, "process_group"), (4, "shm")) else pytest.mark.slow
        )
        for P in (2, 4)
        for transport in TRANSPORTS
    ],
)
def test_a_broken_group_says_so_and_the_process_starts_over(world_size: int, transport: str) -> None:
    replies = Ranks.get(world_size, transport).run(_fail_and_start_over, initialize=False, deadline_s=100)
    for place, (texts, total, name, again) in enumerate(replies):
        if place < world_size - 1:
            first, *later = texts
            assert "fvops.all_gather on group 'brief:0' of (4,) torch.float32, call 2, failed" in first, first
            assert "deadline 2 s" in first
            assert f"place {world_size - 1} (global rank {world_size - 1})" in first
            for op, text in zip(CALLS, later, strict=True):
                assert text.startswith(f"fvops.{op} on group 'brief:0': this group is broken since"), text
                assert first in text
        assert total == [float(world_size)] * 2
        assert name == "brief:0"
        assert again == [1.0] * world_size


def _refused() -> list[str]:
    import fvops

    group = fvops.get_sp_group()
    with pytest.raises(ValueError, match="dim 9"):
        group.all_gather(torch.ones(2), 9)
    with pytest.raises((TypeError, ValueError)):
        group.all_reduce(torch.ones(2, dtype=torch.uint64))
    return [str(group.all_reduce(torch.ones(1)).item())]


def test_a_refusal_does_not_break_a_group(two_ranks: Ranks) -> None:
    assert two_ranks.run(_refused) == [["2.0"]] * 2


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("inf"), float("nan")])
def test_a_deadline_that_is_none_is_refused(timeout_s: float) -> None:
    from fvops import envs

    with pytest.raises(ValueError, match=f"timeout_s={timeout_s} must be"):
        envs.deadline(timeout_s)
