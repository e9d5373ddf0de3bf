"""Limits in bytes at symbolic sizes: they hold, and ranks that met other lengths before decide alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fvops
from fvops.debug import record_collectives
from tests.harness import Ranks

_HEADS, _HEAD_SIZE = 4, 5
_MOST = 40
# What three exchanges of `_MOST` tokens send.
_LIMIT = 3 * _MOST * _HEADS * _HEAD_SIZE * 4
_LENGTHS = (10, _MOST, _MOST + 1, 20, 3 * _MOST + 1, 3)


def _merged_at(length: int) -> list[int]:
    """The tensors of each exchange of three of that length, no more together than the limit admits."""
    return [3] if length <= _MOST else [2, 1] if 2 * length <= 3 * _MOST else [1, 1, 1]


def _qkv(x: Tensor) -> Tensor:
    q, k, v = (fvops.get_sp_group().all_to_all_4D(y, 2, 1) for y in (x.sin(), x * 2, x.cos()))
    return q * k + v.exp()


def _run(compiled: Any, lengths: tuple[int, ...], train: bool = False, declared: bool = False) -> list[list[int]]:
    """The tensors of each exchange that one call issues, at each length; results and gradients are as eager's."""
    issued = []
    for length in lengths:
        x = torch.rand(1, length, _HEADS, _HEAD_SIZE, requires_grad=train)
        if declared:
            torch._dynamo.mark_dynamic(x, 1, min=2, max=1000)
        expected = _qkv(x)
        with record_collectives() as records:
            got = compiled(x)
            if train:
                got_gradient = torch.autograd.grad(got.cos().sum(), x)
        issued.append([len(record.shapes) for record in records])
        torch.testing.assert_close(got, expected)
        if train:
            torch.testing.assert_close(got_gradient, torch.autograd.grad(expected.cos().sum(), x))
    return issued


def _compiled(**arguments: Any) -> Any:
    return torch.compile(_qkv, fullgraph=True, options=fvops.compiler.options(merge=_LIMIT), **arguments)


def _symbols_beside_numbers(lengths: tuple[int, ...], train: bool) -> list[list[int]]:
    """Rank 0 compiles for any length, the others for each anew."""
    return _run(_compiled(dynamic=fvops.get_sp_group().rank_in_group == 0), lengths, train)


@pytest.mark.parametrize("lengths", [_LENGTHS[1:3], pytest.param(_LENGTHS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["inference", "training"])
def test_ranks_with_symbols_and_ranks_with_numbers_merge_alike(
    two_ranks: Ranks, train: bool, lengths: tuple[int, ...]
) -> None:
    expected = [_merged_at(length) * (2 if train else 1) for length in lengths]
    assert two_ranks.run(_symbols_beside_numbers, lengths, train, deadline_s=300) == [expected] * 2


def _recompiled() -> tuple[int, int]:
    """Graphs made, and artifacts found in the caches, when a second process would meet the lengths in another order."""
    _run(_compiled(dynamic=True), _LENGTHS)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    lengths = tuple(reversed(_LENGTHS))
    assert _run(_compiled(dynamic=True), lengths) == list(map(_merged_at, lengths))
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], counters["aot_autograd"]["autograd_cache_hit"]


def test_an_artifact_from_the_cache_is_for_sizes_on_its_side_of_the_limit(two_ranks: Ranks) -> None:
    """Of three: all three merge, two, none. A graph is made for each, not for each length."""
    assert two_ranks.run(_recompiled, deadline_s=300) == [(3, 3)] * 2


def _declared() -> list[list[int]]:
    return _run(_compiled(), _LENGTHS, declared=True)


def test_a_declared_range_counts_with_its_most(two_ranks: Ranks) -> None:
    """torch takes no guard on it; of 1000 tokens, the most that the program declares, no two fit."""
    assert two_ranks.run(_declared, deadline_s=300) == [[[1, 1, 1]] * len(_LENGTHS)] * 2


def _of_data(most: int) -> list[int]:
    """The exchanges of as many rows as a tensor says; the program knows that there are not more than `most`."""
    group = fvops.get_sp_group()

    def program(x: Tensor, count: Tensor) -> Tensor:
        rows = count.item()
        torch._check(rows >= 2)
        torch._check(rows <= most)
        return _qkv(x.new_ones(1, rows, _HEADS, _HEAD_SIZE)) + group.world_size

    options = fvops.compiler.options(merge=_LIMIT)
    with torch._dynamo.config.patch(capture_scalar_outputs=True), record_collectives() as records:
        got = torch.compile(program, fullgraph=True, options=options)(torch.ones(1), torch.tensor(10))
    expected = _qkv(torch.ones(1, 10, _HEADS, _HEAD_SIZE)) + group.world_size
    torch.testing.assert_close(got, expected)
    return [len(record.shapes) for record in records]


def test_a_size_that_is_data_counts_with_what_is_known_of_it(two_ranks: Ranks) -> None:
    assert two_ranks.run(_of_data, _MOST, deadline_s=300) == [[3]] * 2
    assert two_ranks.run(_of_data, _MOST + 1, deadline_s=300) == [[2, 1]] * 2
