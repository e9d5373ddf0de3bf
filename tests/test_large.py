"""Tensors of more than 2**31 bytes, which overflow a 32-bit count somewhere if anything can. Gigabytes; minutes."""

from __future__ import annotations

import pytest
import torch

from tests.harness import Ranks

pytestmark = pytest.mark.slow

# Just above 2**31 bytes, and divisible by 2 in every way that is needed.
_ROWS = (1 << 20) + 4


def _exchange_large(scatter_dim: int) -> list[bool]:
    import fvops

    group = fvops.get_sp_group()
    rank = group.rank_in_group
    x = torch.empty(1, _ROWS, 2, 1024, dtype=torch.uint8)
    assert x.numel() > 1 << 31
    row = torch.arange(_ROWS, dtype=torch.int32).remainder_(251).to(torch.uint8)
    x[0, :, 0], x[0, :, 1] = row[:, None], row[:, None] ^ 255
    x[0, :, :, 0] = rank
    told = []
    if scatter_dim == 2:
        y = group.all_to_all_4D(x)
        del x
        for j in range(2):
            part = y[0, j * _ROWS : (j + 1) * _ROWS, 0]
            told += [torch.equal(part[:, 1], row ^ (255 * rank)), torch.equal(part[:, -1], row ^ (255 * rank))]
            told.append(bool((part[:, 0] == j).all()))
    else:
        y = group.all_to_all_4D(x, 1, 2)
        del x
        mine = row[rank * (_ROWS // 2) : (rank + 1) * (_ROWS // 2)]
        for j in range(2):
            told += [torch.equal(y[0, :, 2 * j, -1], mine), torch.equal(y[0, :, 2 * j + 1, 1], mine ^ 255)]
            told.append(bool((y[0, :, 2 * j : 2 * j + 2, 0] == j).all()))
    return told


@pytest.mark.parametrize("scatter_dim", [2, 1])
def test_all_to_all_4D_of_more_than_two_gigabytes(two_ranks: Ranks, scatter_dim: int) -> None:
    for told in two_ranks.run(_exchange_large, scatter_dim, deadline_s=500):
        assert told == [True] * 6


def _gather_large() -> list[bool]:
    import fvops

    group = fvops.get_sp_group()
    x = torch.full(((1 << 30) + 8,), float(group.rank_in_group + 1), dtype=torch.float16)
    x[-1] = 9
    y = group.all_gather(x, 0)
    n = x.numel()
    ends = [y[0].item() == 1, y[n - 2].item() == 1, y[n - 1].item() == 9, y[n].item() == 2, y[-2].item() == 2]
    return [*ends, y[-1].item() == 9, y.numel() == 2 * n, bool((y[n : 2 * n - 1] == 2).all())]


def test_all_gather_of_more_than_two_gigabytes(two_ranks: Ranks) -> None:
    for told in two_ranks.run(_gather_large, deadline_s=500):
        assert told == [True] * 8
