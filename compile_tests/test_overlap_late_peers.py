"""overlap while a peer is late: what was sent stays as it was, results stay free of reuse, two groups do not mix.

The late rank enters the program only once rank 0 has come to what it computes between starts and waits, so that all of
rank 0's computing there runs before its data is taken.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fvops
from compile_tests.meeting import meet, wait_for
from fvops.debug import record_collectives
from tests.harness import Ranks

# [1, S/P, H, D] of both programs, as a matrix of 256 by 256 too: a buffer of one could be reused for the other. Parts
# of 128 KB: up to 64 KB, shared memory copies them out at once, whether the peer is there or not.
_SHAPE = (1, 64, 16, 64)


def _computed(x: Tensor, key: str, rank: int) -> Tensor:
    """Products that each need a buffer of x's size and leave the last one's to be reused, then the meeting."""
    y = x.reshape(256, 256)
    for _ in range(4):
        y = (y @ y) / 256
    y = meet(y, key, rank)
    return (y @ y).sin()


def _input() -> Tensor:
    return torch.rand(_SHAPE, generator=torch.Generator().manual_seed(fvops.get_world_group().rank))


def _as_diagonal(x: Tensor) -> Tensor:
    """x itself, as a view that Inductor cannot hand to a call: it copies it."""
    B, S, H, D = x.shape
    return torch.diagonal(x.unsqueeze(0).expand(S, B, S, H, D), dim1=0, dim2=2).permute(0, 3, 1, 2)


def _one_group(inductor: dict[str, Any], train: bool, key: str) -> bool:
    group = fvops.get_sp_group()

    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        # Sent are a buffer of the graph's own, which nothing else reads, and a copy that the call makes of a view.
        received = group.all_to_all_4D(x.sin(), 2, 1)
        of_view = group.all_to_all_4D(_as_diagonal(x.cos()), 2, 1)
        return received.cos() + of_view.sin(), _computed(x.detach(), key, group.rank_in_group)

    options = {**fvops.compiler.options(overlap=True), **inductor}
    compiled = torch.compile(program, fullgraph=True, options=options)
    x = _input().requires_grad_(train)
    if group.rank_in_group == 1:
        wait_for(key)
    received, computed = compiled(x)
    wanted, computed_alone = program(x)
    torch.testing.assert_close(received, wanted)
    torch.testing.assert_close(computed, computed_alone)
    if train:
        torch.testing.assert_close(torch.autograd.grad(received.sum(), x), torch.autograd.grad(wanted.sum(), x))
    return True


@pytest.mark.parametrize(
    "inductor", [{}, pytest.param({"memory_planning": True}, marks=pytest.mark.slow)], ids=["", "memory planning"]
)
@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["inference", "training"])
def test_what_was_sent_is_not_reused_before_a_late_peer_has_it(
    two_ranks: Ranks, inductor: dict[str, Any], train: bool
) -> None:
    key = f"met, {inductor}, {train}"
    assert two_ranks.run(_one_group, inductor, train, key, deadline_s=200) == [True, True]


def _two_groups() -> list[list[Any]]:
    """What compiled code and eager issued; a rank has one neighbour in one group, and another in the other.

    Rank 3 is late, so in each group one pair is through while the other still waits.
    """
    rank = fvops.get_world_group().rank
    rows = fvops.init_model_parallel_group([[0, 1], [2, 3]], rank, "gloo", group_name="rows")
    columns = fvops.init_model_parallel_group([[0, 2], [1, 3]], rank, "gloo", group_name="columns")
    try:

        def program(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            along_rows = rows.all_to_all_4D(x.sin(), 2, 1)
            along_columns = columns.all_to_all_4D(x.exp(), 2, 1)
            computed = _computed(x, "met with two groups", rank)
            # And back, the other group first.
            back = columns.all_to_all_4D(along_columns.cos(), 1, 2)
            return rows.all_to_all_4D(along_rows.cos(), 1, 2), back, computed

        compiled = torch.compile(program, fullgraph=True, options=fvops.compiler.options(overlap=True))
        x = _input()
        if rank == 3:
            wait_for("met with two groups")
        with record_collectives() as issued:
            results = compiled(x)
        with record_collectives() as issued_by_eager:
            wanted = program(x)
        torch.testing.assert_close(results, wanted)
        return [
            [(record.op, record.group, record.shapes, record.arguments) for record in records]
            for records in (issued, issued_by_eager)
        ]
    finally:
        rows.destroy()
        columns.destroy()


def test_two_groups_are_started_in_eager_s_order() -> None:
    ranks = Ranks.get(4)
    for issued, issued_by_eager in ranks.run(_two_groups, deadline_s=200):
        assert issued == issued_by_eager
        assert [group.split(":")[0] for _, group, *_ in issued] == ["rows", "columns", "columns", "rows"]
