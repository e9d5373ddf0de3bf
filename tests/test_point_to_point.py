"""send and recv: chains that would deadlock if send waited, order, and who owns the buffer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.harness import Ranks


def _send_first(nbytes: int, rounds: int) -> list[bool]:
    import fvops

    group = fvops.get_sp_group()
    rank, P = group.rank_in_group, group.world_size
    told = []
    for turn in range(rounds):
        group.send(torch.full((nbytes,), rank + 10 * turn, dtype=torch.uint8))
        received = group.recv((nbytes,), torch.uint8)
        told.append(bool((received == (rank - 1) % P + 10 * turn).all()))
    return told


@pytest.mark.parametrize("nbytes", [1 << 10, 1 << 20, 32 << 20], ids=["1KB", "1MB", "32MB"])
def test_a_ring_in_which_every_rank_sends_first(ranks: Ranks, nbytes: int) -> None:
    assert ranks.run(_send_first, nbytes, 2, deadline_s=50) == [[True, True]] * ranks.world_size


def _send_many_first(count: int, numel: int) -> list[int]:
    """All sends of differing sizes before the first receive; a receive of the wrong one would not fit."""
    import fvops

    group = fvops.get_sp_group()
    rank = group.rank_in_group
    for number in range(count):
        group.send(torch.full((numel + number,), 1000 * rank + number))
    return [int(group.recv((numel + number,), torch.int64)[-1]) for number in range(count)]


@pytest.mark.parametrize("numel", [1, 30_000])
def test_sends_match_receives_in_order(ranks: Ranks, numel: int) -> None:
    P = ranks.world_size
    wanted = [[1000 * ((rank - 1) % P) + number for number in range(12)] for rank in range(P)]
    assert ranks.run(_send_many_first, 12, numel) == wanted


def _overwrite(numel: int) -> Tensor:
    import fvops

    group = fvops.get_sp_group()
    x = torch.full((numel,), float(group.rank_in_group))
    group.send(x)
    x.fill_(-1.0)
    group.send(x.mul_(2))
    x.zero_()
    # Nobody has received yet: the barrier would hang if the sends had waited.
    group.barrier()
    return torch.stack([group.recv((numel,), torch.float32), group.recv((numel,), torch.float32)])


@pytest.mark.parametrize("numel", [3, 1 << 20])
def test_the_caller_may_overwrite_what_it_sent(ranks: Ranks, numel: int) -> None:
    P = ranks.world_size
    for rank, received in enumerate(ranks.run(_overwrite, numel)):
        assert bool((received[0] == (rank - 1) % P).all())
        assert bool((received[1] == -2).all())


def _both_ways() -> list[int]:
    import fvops

    group = fvops.get_sp_group()
    rank, P = group.rank_in_group, group.world_size
    others = [place for place in range(P) if place != rank]
    for dst in others:
        group.send(torch.tensor(100 * rank + dst), dst)
    return [int(group.recv((), torch.int64, src)) for src in reversed(others)]


def test_everyone_to_everyone_received_in_another_order(ranks: Ranks) -> None:
    P = ranks.world_size
    for rank, received in enumerate(ranks.run(_both_ways)):
        assert received == [100 * src + rank for src in reversed(range(P)) if src != rank]


def _between_collectives() -> list[float]:
    import fvops

    group = fvops.get_sp_group()
    group.send(torch.full((500_000,), float(group.rank_in_group)))
    total = group.all_reduce(torch.ones(500_000))
    received = group.recv((500_000,), torch.float32)
    return [total[0].item(), total[-1].item(), received[0].item(), received[-1].item()]


def test_an_open_send_does_not_disturb_a_collective(ranks: Ranks) -> None:
    P = ranks.world_size
    wanted = [[float(P)] * 2 + [float((rank - 1) % P)] * 2 for rank in range(P)]
    assert ranks.run(_between_collectives) == wanted


def _sends_before_destroy() -> float:
    """The receiver comes late; the sender's group is destroyed right after the send."""
    import fvops
    from tests import harness

    harness.init_fvops()
    group = fvops.get_sp_group()
    got = float(group.rank_in_group)
    if group.rank_in_group == 0:
        group.send(torch.full((1 << 20,), 7.0), 1)
    else:
        got = group.recv((1 << 20,), torch.float32, 0)[-1].item()
    group.destroy()
    fvops.get_world_group().barrier()
    fvops.cleanup_dist_env_and_memory()
    return got


def test_destroy_sees_open_sends_through(two_ranks: Ranks) -> None:
    assert two_ranks.run(_sends_before_destroy, initialize=False) == [0.0, 7.0]
