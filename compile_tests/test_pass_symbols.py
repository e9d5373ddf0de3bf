"""Of two ranks one has compiled with numbers, the other with symbols: the passes do the same at both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fvops
from fvops.debug import record_collectives
from tests.harness import Ranks

Program = Callable[..., list[Tensor]]


def _heads(x: Tensor) -> Tensor:
    return fvops.get_sp_group().all_to_all_4D(x, 2, 1)


def _sequence(x: Tensor) -> Tensor:
    return fvops.get_sp_group().all_to_all_4D(x, 1, 2)


def _own_attention(x: Tensor, text: Tensor) -> Tensor:
    """Inductor finds attention in it, and writes that as one op, where lengths are numbers."""
    q, k, v = (_heads(y).transpose(1, 2) for y in (x.sin(), x * 2, x.cos()))
    attended = torch.softmax(q @ k.transpose(-2, -1) / 2.0, -1) @ v
    return attended.sum() + (_heads(text.sin()) * _heads(text.cos())).sum()


def _positions(x: Tensor, text: Tensor) -> Tensor:
    """A size is asked of what was received; the second exchange reads no element of it."""
    received = _heads(x.sin())
    positions = torch.ones_like(received[0, :, 0, 0]).cumsum(0)[: x.size(1)]
    return received * _heads(x * positions.view(1, -1, 1, 1)) + _heads(torch.zeros_like(x) + text.sum())


def _declared_beside_others(declared: Tensor, text: Tensor) -> Tensor:
    return _heads(declared.sin()).sum() + _heads(text.cos()).sum()


def _data_beside_others(x: Tensor, count: Tensor) -> Tensor:
    rows = count.item()
    torch._check(rows >= 2)
    torch._check(rows <= 50)
    return _heads(x.sin()).sum() + _heads(x.new_ones(1, rows, 8, 4)).sum()


def _all_merged(x: Tensor, text: Tensor, declared: Tensor, count: Tensor) -> list[Tensor]:
    results: list[Tensor] = []
    for program, second in (
        (_own_attention, text),
        (_positions, text),
        (_declared_beside_others, None),
        (_data_beside_others, count),
    ):
        first = declared if second is None else x
        results.append(program(first, text if second is None else second))
        fvops.get_sp_group().barrier()
    return results


def _video(x: Tensor, frames: int, height: int, width: int) -> list[Tensor]:
    """That the shape which comes back is the old one follows from the view alone."""
    return [_sequence(_heads(x).unflatten(1, (frames, height, width)).sin().flatten(1, 3))]


def _all_cancelled(x: Tensor, length: int) -> list[Tensor]:
    y = _heads(x) * torch.tensor(x.size(1)) + torch.tensor(float(x.size(1))).log()
    # The second is cut to a length which it has already.
    return [_sequence(y + x.new_tensor(x.size(1))), _sequence(_heads(x.cos())[:, :length].sin())]


def _cut(x: Tensor, length: int) -> list[Tensor]:
    received = _heads(x)
    return [_sequence(torch.cat([received[:, :length].sin(), received[:, length:]], 1))]


def _issued(program: Callable[..., list[Tensor]], switches: dict[str, Any], train: bool) -> list[list[int]]:
    """The tensors of each exchange: of those that are issued without gradients, and of all."""
    group = fvops.get_sp_group()
    symbols = group.rank_in_group == 0
    generator = torch.Generator().manual_seed(group.rank_in_group)
    P = group.world_size
    sizes = ((2, 60 // P, 8, 6), (2, 7, 8, 6), (2, 9, 8, 6))
    x, text, declared = (torch.rand(size, generator=generator, dtype=torch.float64) for size in sizes)
    torch._dynamo.mark_dynamic(declared, 1, min=2, max=1000)
    rest = {_all_merged: (text, declared, torch.tensor(10)), _video: (3, 4, 5), _all_cancelled: (60,), _cut: (30,)}
    options = fvops.compiler.options(**switches)
    compiled = torch.compile(program, fullgraph=True, dynamic=symbols, options=options)
    results, issued = [], []
    for run in (program, compiled):
        leaf = x.clone().requires_grad_(train)
        with torch._dynamo.config.patch(capture_scalar_outputs=True), record_collectives() as records:
            found = run(leaf, *rest[program])
            if train:
                sum(result.cos().sum() for result in found).backward()
        results.append([result.detach() for result in found] + [leaf.grad] * train)
        issued.append([len(record.shapes) for record in records if record.op != "barrier"])
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
    return issued[1]


@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["inference", "training"])
def test_merged_alike(two_ranks: Ranks, train: bool) -> None:
    results = two_ranks.run(_issued, _all_merged, {"merge": True}, train, deadline_s=300)
    assert results[0] == results[1]
    assert results[0][:4] == [5, 3, 2, 2]


@pytest.mark.parametrize(
    ("program", "train"),
    [
        (_video, False),  # its backward at symbols was not compiled in 60 s, without any pass (torch 2.13)
        pytest.param(_all_cancelled, False, marks=pytest.mark.slow),
        (_all_cancelled, True),
    ],
)
def test_cancelled_alike(two_ranks: Ranks, program: Program, train: bool) -> None:
    assert two_ranks.run(_issued, program, {"cancel": True}, train, deadline_s=300) == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_a_part_is_kept_alike(two_ranks: Ranks, train: bool) -> None:
    count = 4 if train else 2
    assert two_ranks.run(_issued, _cut, {"cancel": True}, train, deadline_s=300) == [[1] * count] * 2


def _whole_or_part(lengths: tuple[int, ...]) -> list[int]:
    """How many exchanges one compiled program issues at each length of a slice; values are eager's."""

    def program(x: Tensor, length: int) -> Tensor:
        return _sequence(_heads(x)[:, :length].sin())

    compiled = torch.compile(program, fullgraph=True, dynamic=True, options=fvops.compiler.options(cancel=True))
    x, issued = torch.rand(1, 60 // fvops.get_sp_group().world_size, 4, 3), []
    for length in lengths:
        with record_collectives() as records:
            got = compiled(x, length)
        issued.append(len(records))
        torch.testing.assert_close(got, program(x, length))
    return issued


def test_a_length_at_which_it_is_otherwise_is_compiled_anew(two_ranks: Ranks) -> None:
    assert two_ranks.run(_whole_or_part, (30, 60, 30), deadline_s=300) == [[2, 0, 2]] * 2
