"""dead: what nobody reads is not sent, in forward and backward; what is read, or computes, stays. Only on request."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fvops
from compile_tests import pass_programs
from compile_tests.pass_programs import Issued, Program, compare_with_eager
from tests.harness import Ranks


def _heads(x: Tensor) -> Tensor:
    return fvops.get_sp_group().all_to_all_4D(x, 2, 1)


def _sequence(x: Tensor) -> Tensor:
    return fvops.get_sp_group().all_to_all_4D(x, 1, 2)


def _unread(x: Tensor) -> Tensor:
    _heads(x.sin())
    fvops.get_sp_group().all_gather(x, 1)
    fvops.get_sp_group().all_to_all_4D_coalesced([x, x * 2], 2, 1)
    return _heads(x * 2)


def _chain(x: Tensor) -> Tensor:
    """Only an unread exchange reads the first."""
    _sequence(_heads(x).sin()).cos()
    return x * 2


def _one_of_a_list(x: Tensor) -> Tensor:
    first, _ = fvops.get_sp_group().all_to_all_4D_coalesced([x, x * 2], 2, 1)
    return first


def _others(x: Tensor) -> Tensor:
    group = fvops.get_sp_group()
    group.all_reduce(x.detach())
    group.reduce_scatter(x.detach(), dim=1)
    torch.ops.fvops.broadcast(x.detach(), 0, group.world_size, group.unique_name)
    group.send(x.detach())
    group.recv(x.shape, x.dtype)
    return x.sin()


# name -> (program, the ops that a forward still issues)
PROGRAMS: dict[str, tuple[Program, list[str]]] = {
    "unread": (_unread, ["all_to_all_4D"]),
    "chain": (_chain, []),
    "one of a list": (_one_of_a_list, ["all_to_all_4D_coalesced"]),
    "others": (_others, ["all_reduce", "reduce_scatter", "broadcast", "send", "recv"]),
}
BACKWARD = ["all_to_all_4D_coalesced", "all_to_all_4D"]


def _compare(switches: dict[str, Any], train: bool) -> dict[str, tuple[Issued, Issued]]:
    # In a worker process: the programs of this file stand beside the others.
    pass_programs.PROGRAMS.update({name: program for name, (program, _) in PROGRAMS.items()})
    return compare_with_eager(list(PROGRAMS), switches, train)


def _ops(sequence: Issued) -> list[str]:
    return [op for op, _, _ in sequence if op != "barrier"]


@pytest.mark.slow
def test_unread_exchanges_are_not_sent(two_ranks: Ranks) -> None:
    for results in two_ranks.run(_compare, {"dead": True}, False, deadline_s=200):
        for name, (eager, left) in results.items():
            assert _ops(left) == PROGRAMS[name][1], name
            assert name == "one of a list" or name == "others" or len(left) < len(eager), name


@pytest.mark.parametrize("world_size", [2, *(pytest.param(P, marks=pytest.mark.slow) for P in (3, 4))])
def test_in_forward_and_backward(world_size: int) -> None:
    """What is dropped from the joint graph takes its backward with it."""
    forward = [op for _, ops in PROGRAMS.values() for op in ops]
    for results in Ranks.get(world_size).run(_compare, {"dead": True}, True, deadline_s=300):
        _, left = results["all"]
        assert _ops(left) == forward + BACKWARD


def test_everything_on_does_not_mean_dead(two_ranks: Ranks) -> None:
    for issued in two_ranks.run(_all_on, deadline_s=200):
        assert issued == ["all_to_all_4D"]


def _all_on() -> list[str]:
    options = {**fvops.compiler.options(), "fallback_by_default": True}
    x = torch.rand(1, 4, 4, 2)

    def program(x: Tensor) -> Tensor:
        _heads(x)
        return x.sin()

    with fvops.debug.record_collectives() as records:
        torch.compile(program, fullgraph=True, options=options)(x)
    return [record.op for record in records]
