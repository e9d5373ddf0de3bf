"""The harness itself: it returns results, shows a rank's error as itself, and ends a hang at its deadline."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from tests.harness import RankFailure, Ranks


def _give_rank(offset: int) -> tuple[int, torch.Tensor]:
    rank = int(os.environ["RANK"])
    return rank + offset, torch.full((2,), float(rank))


def _raise_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        raise KeyError("the reason")


def _hang_on_rank_0() -> None:
    if os.environ["RANK"] == "0":
        threading.Event().wait()


def _die_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        os._exit(7)


def test_results_come_back_in_rank_order(ranks: Ranks) -> None:
    results = ranks.run(_give_rank, 10)
    assert [number for number, _ in results] == [10 + rank for rank in range(ranks.world_size)]
    assert [tensor.tolist() for _, tensor in results] == [[float(rank)] * 2 for rank in range(ranks.world_size)]


def test_an_error_is_shown_as_itself_and_the_next_run_gets_new_processes() -> None:
    with pytest.raises(RankFailure, match=r"rank 1: raised(.|\n)*KeyError: 'the reason'"):
        Ranks.get(2).run(_raise_on_rank_1)
    assert [number for number, _ in Ranks.get(2).run(_give_rank, 0)] == [0, 1]


def test_a_hang_ends_at_the_deadline_with_the_stacks() -> None:
    pool = Ranks.get(2)
    processes = list(pool._processes)
    with pytest.raises(RankFailure, match=r"not done after 3 s(.|\n)*_hang_on_rank_0(.|\n)*end of dump"):
        pool.run(_hang_on_rank_0, deadline_s=3)
    assert not any(process.is_alive() for process in processes)


def test_a_dead_rank_is_reported() -> None:
    with pytest.raises(RankFailure, match=r"rank 1: died\nexit code 7"):
        Ranks.get(2).run(_die_on_rank_1)
