"""check_collectives under torch.compile: one rank skips a layer, or goes another way back, and all get the table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import Ranks


def _layers(group: Any, x: Tensor, count: int) -> Tensor:
    for _ in range(count):
        x = group.all_to_all_4D(group.all_to_all_4D(x * 2, 2, 1) + 1, 1, 2)
    return group.all_gather(x, 1)


def _skip_a_layer(skips: bool) -> tuple[list[str], str]:
    """The last rank has one layer less. What each rank was told, and what it recorded in eager when all agree."""
    import fvops
    from fvops.debug import check_collectives

    group = fvops.get_sp_group()
    P = group.world_size
    count = 3 - (skips and group.rank_in_group == P - 1)
    x = torch.ones(1, 2, P, 2)
    program = torch.compile(lambda x: _layers(group, x, count), fullgraph=True)
    program(x) if not skips else None
    with check_collectives():
        try:
            y = program(x)
        except RuntimeError as error:
            return [str(error)], ""
    return [], str(torch.equal(y, _layers(group, x, count)))


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_compiled_program_in_which_one_rank_skips_a_layer(world_size: int) -> None:
    ranks = Ranks.get(world_size)
    assert ranks.run(_skip_a_layer, False) == [([], "True")] * world_size
    replies = ranks.run(_skip_a_layer, True)
    ranks.run(_nothing, initialize=False)
    for rank, ((text,), _) in enumerate(replies):
        print(text)
        assert "the ranks' ops differ" in text
        rows = [line.split(" | ") for line in text.splitlines() if " | " in line][1:]
        assert [row[0].strip() for row in rows] == [str(place) for place in range(world_size)]
        assert [row[3].strip() for row in rows] == ["all_to_all_4D"] * (world_size - 1) + ["all_gather"]
        assert all("test_mismatch.py:" in row[-1] and "compiled" in row[-1] for row in rows), rank


def _skip_in_backward() -> str:
    """All run the same forward; the last rank's loss takes another way back. Compiled on rank 0, eager elsewhere."""
    import fvops
    from fvops.debug import check_collectives

    group = fvops.get_sp_group()
    P, last = group.world_size, group.rank_in_group == group.world_size - 1
    x = torch.ones(1, 2, P, 2, requires_grad=True)

    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        return group.all_to_all_4D(x), group.all_gather(x, 1)

    if group.rank_in_group == 0:
        program = torch.compile(program, fullgraph=True)
    with check_collectives():
        exchanged, gathered = program(x)
        loss = exchanged.sum() if last else exchanged.sum() + gathered.sum()
        try:
            loss.backward()
        except RuntimeError as error:
            return str(error)
        try:
            group.barrier()
        except RuntimeError as error:
            return str(error)
    return ""


def _nothing() -> None:
    """That fvops is torn down before it, and set up again by the next job, is the point."""


def test_a_backward_in_which_one_rank_takes_another_way(ranks: Ranks) -> None:
    texts = ranks.run(_skip_in_backward)
    ranks.run(_nothing, initialize=False)
    for text in texts:
        rows = [line.split(" | ") for line in text.splitlines() if " | " in line][1:]
        assert len(rows) == ranks.world_size, text
        assert "(compiled, backward)" in rows[0][-1], text
