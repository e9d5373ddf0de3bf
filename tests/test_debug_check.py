"""check_collectives: what differs between ranks is shown on every rank, and what agrees runs as before."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import harness
from tests.harness import RankFailure, Ranks
from tests.refusal import refusal
from tests.worlds import initialized


def told(call: Any) -> str:
    """The error that `call` raises under checking, on this rank."""
    from fvops.debug import check_collectives

    with check_collectives():
        return refusal(call)


def _agree() -> list[str]:
    """A program that agrees in all it does, each op with what may differ between ranks differing."""
    import fvops
    from fvops.debug import canonical, check_collectives, record_collectives

    group = fvops.get_sp_group()
    rank, P = group.rank_in_group, group.world_size
    x = torch.ones(1, P, P, 2, requires_grad=True)
    rows = [1 + (rank + place) % 2 for place in range(P)]

    def program() -> None:
        for _ in range(2):
            y = group.all_gather(group.all_to_all_4D(x.transpose(1, 2) if rank else x), 1)
            y.sum().backward()
            group.all_to_all_single(torch.ones(sum(rows), 3), rows, rows)
            group.gather(x.detach(), 1)
            group.send(torch.ones(2, 3), (rank + 1) % P)
            group.recv((6,), torch.float32, (rank - 1) % P)
            group.broadcast_object({"rank": rank}, src=P - 1)
            group.broadcast_object_list([rank])
            group.broadcast_tensor_dict({"x": torch.ones(2)} if rank == 0 else None)
            group.send_object("x", (rank + 1) % P)
            group.recv_object((rank - 1) % P)
            group.send_tensor_dict({"x": torch.ones(rank + 1)})
            group.recv_tensor_dict()
            group.barrier()
            torch.ops.fvops.reduce(x.detach(), "sum", 1, P, group.unique_name)

    traces = []
    with record_collectives() as records:
        program()
    traces.append(canonical(records))
    with check_collectives(), record_collectives() as records:
        program()
    traces.append(canonical(records))
    assert traces[0] == traces[1]
    return [str(traces[1])]


def test_ranks_that_agree_do_what_they_did(ranks: Ranks) -> None:
    ranks.run(_agree)


def _differ(kind: str) -> str:
    import fvops

    group = fvops.get_sp_group()
    rank, P = group.rank_in_group, group.world_size
    odd = rank == P - 1
    x = torch.ones(P, P, 2)
    rows = [1] * P
    calls = {
        "ops": lambda: group.all_gather(x) if odd else group.all_reduce(x),
        "shapes": lambda: group.all_reduce(x[0] if odd else x),
        "dtypes": lambda: group.all_reduce(x.double() if odd else x),
        "dim": lambda: group.all_gather(x, 1 if odd else 0),
        "reduction": lambda: group.all_reduce(x, torch.distributed.ReduceOp.MAX if odd else None),
        "src": lambda: group.broadcast(x, int(odd)),
        "an object": lambda: group.broadcast_object(1) if odd else group.all_reduce(x),
        "object src": lambda: group.broadcast_object(1, int(odd)),
        "objects": lambda: group.broadcast_tensor_dict({}) if odd else group.broadcast_object_list([1]),
        "splits": lambda: group.all_to_all_single(torch.ones(P, 2), [*rows[:-1], 1 + odd], rows),
    }
    return told(calls[kind])


WORDS = {
    "ops": "the ranks' ops differ",
    "shapes": "the ranks' shapes differ",
    "dtypes": "the ranks' dtypes differ",
    "dim": "the ranks' arguments differ",
    "reduction": "the ranks' arguments differ",
    "src": "the ranks' arguments differ",
    "an object": "the ranks' ops differ",
    "object src": "the ranks' arguments differ",
    "objects": "the ranks' ops differ",
    "splits": "which expects 2",
}


@pytest.mark.parametrize("kind", list(WORDS))
def test_a_difference_is_told_on_every_rank_with_a_table(kind: str) -> None:
    world_size = 2 + list(WORDS).index(kind) % 3
    texts = Ranks.get(world_size).run(_differ, kind, initialize=True)
    Ranks.get(world_size).run(_start_over, initialize=False)
    for text in texts:
        assert WORDS[kind] in text
        assert "was not issued" in text
        lines = [line for line in text.splitlines() if " | " in line]
        assert len(lines) == 1 + world_size
        assert all("test_debug_check.py:" in line and " in <lambda>" in line for line in lines[1:])
    assert len({text.partition("was not issued")[2] for text in texts}) == 1


def _start_over() -> None:
    """Nothing: that fvops is torn down before, and set up again by the next job, is the point."""


def _in_different_groups() -> str:
    """Rank 0 waits in one group, the last in another; those between are in the first."""
    import fvops

    with initialized(suffix="a"):
        one = fvops.get_sp_group()
        other = fvops.initialize_sequence_parallel_group(one.world_size, group_name_suffix="other")
        last = one.rank_in_group == one.world_size - 1
        return told(lambda: (other if last else one).all_reduce(torch.ones(3)))


def test_ranks_in_different_groups_are_told_so_long_before_the_deadline(ranks: Ranks) -> None:
    for text in ranks.run(_in_different_groups, initialize=False, deadline_s=60):
        assert "the ranks wait for one another" in text or "was refused a call" in text
        assert "sp:0" in text
        assert "sp_other:0" in text


def _left(how: str) -> str:
    """The last rank does not come: it destroys the group, exits, or computes until after the deadline."""
    import torch.distributed as dist

    import fvops
    from fvops.debug import check, check_collectives

    with initialized(suffix="a"):
        group = fvops.initialize_sequence_parallel_group(
            fvops.get_world_size(), group_name_suffix="brief", timeout_s=2.0 if how == "is late" else None
        )
        last, store = group.rank_in_group == group.world_size - 1, dist.distributed_c10d._get_default_store()
        text = ""
        with check_collectives():
            group.all_reduce(torch.ones(3))
            if last and how == "destroyed":
                group.destroy()
            if last and how == "exited":
                check._say_that_we_exit()  # what is registered with atexit
            if not last:
                text = told(lambda: group.all_gather(torch.ones(3)))
                store.set(f"told/{group.rank_in_group}", "")
        store.wait([f"told/{place}" for place in range(group.world_size - 1)], timedelta(seconds=30))
        return text


@pytest.mark.parametrize("how", ["destroyed", "exited", "is late"])
def test_a_rank_that_will_not_come_is_told(two_ranks: Ranks, how: str) -> None:
    text, _ = two_ranks.run(_left, how, initialize=False, deadline_s=60)
    words = {"destroyed": "has destroyed group", "exited": "has exited", "is late": "did not come within 2 s"}
    assert f"rank 1 {words[how]}" in text
    assert "its last call was all_reduce, call 1 of group 'sp_brief:0'" in text


def _messages_differ() -> list[str]:
    """The receiver expects another number of elements; the sender learns of it at its next call."""
    import fvops

    with initialized(suffix="a"):
        group = fvops.get_sp_group()
        if group.rank_in_group == 0:
            return [told(lambda: (group.send(torch.ones(3)), group.barrier()))]
        return [told(lambda: group.recv((4,), torch.float32))]


def test_a_message_that_does_not_fit_is_told_on_both_ends(two_ranks: Ranks) -> None:
    (sender,), (receiver,) = two_ranks.run(_messages_differ, initialize=False, deadline_s=60)
    assert "sender and receiver have another number of elements" in receiver
    assert "rank 1 was refused a call" in sender
    for text in (sender, receiver):
        assert "(4,)" in text


def _kinds_differ() -> list[str]:
    """An object is sent where a tensor is received; the group is broken then, for objects too."""
    import fvops

    with initialized(suffix="a"):
        group = fvops.get_sp_group()
        if group.rank_in_group == 0:
            texts = [told(lambda: (group.send_object("x", 1), group.barrier()))]
        else:
            texts = [told(lambda: group.recv((4,), torch.float32))]
        return [*texts, told(lambda: group.broadcast_object(1))]


def test_a_message_of_another_kind_is_told_on_both_ends(two_ranks: Ranks) -> None:
    (sender, *after), (receiver, *later) = two_ranks.run(_kinds_differ, initialize=False, deadline_s=60)
    assert "a recv meets a send_object" in receiver
    assert "rank 1 was refused a call" in sender
    assert all("this group is broken" in text for text in (*after, *later))


def _die(folder: str) -> None:
    import fvops

    group = fvops.get_sp_group()
    if group.rank_in_group == 1:
        told(group.barrier)
        os.kill(os.getpid(), signal.SIGKILL)
    group_text = told(lambda: (group.barrier(), group.all_reduce(torch.ones(3))))
    Path(folder, str(group.rank_in_group)).write_text(group_text)


def test_a_death_is_told_on_every_other_rank(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="exit code -9"):
        Ranks.get(3).run(_die, str(tmp_path), deadline_s=60)
    for place in (0, 2):
        text = (tmp_path / str(place)).read_text()
        assert "has died" in text or "was refused a call" in text


def _by_variable() -> list[str]:
    """``FVOPS_DEBUG=collectives``, read when a group is made; and what is left in the store by many calls."""
    import torch.distributed as dist

    import fvops

    os.environ["FVOPS_DEBUG"] = "collectives"
    try:
        harness.init_fvops(suffix="a")
        group, store = fvops.get_sp_group(), dist.distributed_c10d._get_default_store()
        group.barrier()
        before = store.num_keys()
        for _ in range(20):
            group.barrier()
            group.send(torch.ones(2))
            group.recv((2,), torch.float32)
        group.barrier()
        dist.barrier()
        grown = store.num_keys() - before
        with pytest.raises(RuntimeError) as caught:
            group.all_reduce(torch.ones(2 + group.rank_in_group))
        dist.barrier()
        fvops.cleanup_dist_env_and_memory()
        return [str(caught.value), str(grown)]
    finally:
        del os.environ["FVOPS_DEBUG"]


def test_the_variable_turns_it_on_and_notices_do_not_pile_up(two_ranks: Ranks) -> None:
    for text, grown in two_ranks.run(_by_variable, initialize=False):
        assert "the ranks' shapes differ" in text
        # Of each pair of ranks, the notices of its last messages.
        assert int(grown) <= 4


def _the_variable_is_read_when_a_group_is_made() -> list[bool]:
    from fvops.debug.calls import observers

    with initialized(suffix="b"):
        return [bool(observers)]


def test_without_the_variable_it_is_off_again(two_ranks: Ranks) -> None:
    assert two_ranks.run(_the_variable_is_read_when_a_group_is_made, initialize=False) == [[False]] * 2
