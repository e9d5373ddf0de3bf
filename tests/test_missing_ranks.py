"""A rank that does not come is named, by every rank that waited for it, within the deadline."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch

from tests.harness import Ranks

DEADLINE_S = 3


def _leave_out(absent: int, op: str) -> str:
    """The error of the ranks that came; the absent one waits for the store to have heard of all the others."""
    import torch.distributed as dist

    import fvops

    before = os.environ["FVOPS_TIMEOUT_S"]
    os.environ["FVOPS_TIMEOUT_S"] = str(DEADLINE_S)
    group = fvops.initialize_sequence_parallel_group(fvops.get_world_size(), group_name_suffix="brief")
    store = dist.distributed_c10d._get_default_store()
    here, P = group.rank_in_group, group.world_size
    calls = {
        "all_reduce": lambda: group.all_reduce(torch.ones(3)),
        "all_to_all_4D": lambda: group.all_to_all_4D(torch.ones(1, 2, P, 2)),
        "barrier": group.barrier,
        "recv": lambda: group.recv((3,), torch.float32, absent),
    }
    text = ""
    try:
        if here != absent:
            try:
                calls[op]()
            except RuntimeError as error:
                text = str(error)
            store.set(f"told/{op}/{here}", "")
        # Everyone stays until all have told: a connection that goes away is another failure.
        told = [f"told/{op}/{place}" for place in range(P) if place != absent]
        store.wait(told, timedelta(seconds=30))
    finally:
        os.environ["FVOPS_TIMEOUT_S"] = before
        group.destroy()
    return text


@pytest.mark.parametrize(
    ("world_size", "absent", "op"), [(2, 1, "recv"), (3, 0, "all_to_all_4D"), (4, 2, "all_reduce"), (4, 1, "barrier")]
)
def test_who_is_missing_is_said(world_size: int, absent: int, op: str) -> None:
    texts = Ranks.get(world_size).run(_leave_out, absent, op, deadline_s=60)
    assert texts.pop(absent) == ""
    for text in texts:
        assert f"fvops.{op} on group 'sp_brief:0'" in text
        assert f"deadline {DEADLINE_S} s" in text
        assert f"missing: place {absent} (global rank {absent})." in text


def _make_a_group_without(absent: int) -> str:
    import torch.distributed as dist

    from fvops.parallel_state import init_model_parallel_group
    from tests.worlds import initialized

    with initialized():
        P, here = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        store = dist.distributed_c10d._get_default_store()
        if here == absent:
            store.wait([f"made/{place}" for place in range(P) if place != absent], timedelta(seconds=60))
            return ""
        with pytest.raises(RuntimeError) as caught:
            init_model_parallel_group([list(range(P))], 0, "gloo", group_name="brief", timeout_s=1.0)
        store.set(f"made/{here}", "")
    return str(caught.value)


def test_a_group_that_a_rank_does_not_make_is_said_not_to_be_made() -> None:
    texts = Ranks.get(2).run(_make_a_group_without, 1, initialize=False, deadline_s=100)
    began = (
        "group 'brief' of global ranks [0, 1] could not be made (deadline 1 s): a rank of the world has died, or makes"
    )
    assert texts[0].startswith(began), texts
    assert texts[1] == ""


def _settle_without(absent: int) -> list[str]:
    """What each way to settle something says when a rank does not come, each over a process group of its own."""
    import torch.distributed as dist

    from fvops.agreement import agree_on_max, check_same_ops
    from fvops.device_communicators.shm.creation import form_segments
    from fvops.device_communicators.symmetric_creation import agree
    from fvops.node import is_the_same_node_as
    from tests.worlds import initialized

    told = []
    with initialized():
        P, here = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        store = dist.distributed_c10d._get_default_store()
        groups = [dist.new_group(list(range(P)), backend="gloo", timeout=timedelta(seconds=1)) for _ in range(5)]
        if here == absent:
            store.wait([f"settled/{place}" for place in range(P) if place != absent], timedelta(seconds=60))
            return []
        for settle, group in zip(
            (
                lambda group: agree_on_max(3, group),
                check_same_ops,
                is_the_same_node_as,
                lambda group: form_segments(group, "", 1 << 20, None, "/dev/shm"),
                lambda group: agree(group, ""),
            ),
            groups,
            strict=True,
        ):
            with pytest.raises(RuntimeError) as caught:
                settle(group)
            told.append(str(caught.value))
        store.set(f"settled/{here}", "")
    return told


def test_what_cannot_be_settled_without_a_rank_is_said() -> None:
    told, nothing = Ranks.get(2).run(_settle_without, 1, initialize=False, deadline_s=100)
    assert nothing == []
    for what, text in zip(
        ("a number", "whether all run", "which of them share", "a transport over shared", "a transport over symm"),
        told,
        strict=True,
    ):
        assert text.startswith(f"the global ranks [0, 1] could not settle {what}"), text
        assert "a rank of the world has died, or makes no such group, or did not come in time" in text
