"""Partial losses: a superset in backward, alike on all ranks. Programs' own autograd functions. Late split sizes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import fvops
from fvops.debug import canonical, record_collectives
from tests.harness import Ranks

Sequence = list[tuple[str, str, int]]


def _two_outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    group = fvops.get_sp_group()
    return group.all_to_all_4D(x.sin(), 2, 1), group.all_gather(x.cos(), 0)


def _partial_loss(backend: str) -> tuple[Sequence, Sequence]:
    """Backward collectives of a loss on the second output only, eager and compiled; the gradients must agree."""
    grads, sequences = [], []
    for function in (_two_outputs, torch.compile(_two_outputs, fullgraph=True, backend=backend)):
        x = torch.ones(1, 3, 4, 2, requires_grad=True)
        output = function(x)[1]
        with record_collectives() as records:
            output.sum().backward()
        grads.append(x.grad)
        sequences.append(canonical(records))
    torch.testing.assert_close(grads[1], grads[0])
    return sequences[0], sequences[1]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_partial_loss_issues_a_superset_alike_on_all_ranks(two_ranks: Ranks, backend: str) -> None:
    results = two_ranks.run(_partial_loss, backend, deadline_s=180)
    (eager, compiled), _ = results
    assert results[0] == results[1]
    assert [op for _, op, _ in eager] == ["reduce_scatter"]
    assert not Counter(eager) - Counter(compiled)
    assert [op for _, op, _ in compiled] == ["reduce_scatter", "all_to_all_4D"]


class _Gathered(torch.autograd.Function):
    """A program's own function, as users of process groups write them: collectives in its forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        group = fvops.get_sp_group()
        (exchanged,) = group.all_to_all_4D_coalesced([group.all_to_all_4D(x, 2, 1)], 1, 2)
        return group.all_gather(group.all_reduce(exchanged), dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        group = fvops.get_sp_group()
        reduced = group.all_reduce(group.reduce_scatter(grad, dim=1))
        (exchanged,) = group.all_to_all_4D_coalesced([reduced], 2, 1)
        return group.all_to_all_4D(exchanged, 1, 2)


def _own_function(backend: str) -> tuple[Sequence, Sequence]:
    """What eager and compiled code issues; results and gradients must agree."""

    def function(x: Tensor) -> Tensor:
        return _Gathered.apply(x.sin()).cos()

    found, sequences = [], []
    for run in (function, torch.compile(function, fullgraph=True, backend=backend)):
        x = torch.linspace(0, 1 + fvops.get_sp_group().rank_in_group, 24).view(1, 3, 4, 2).requires_grad_()
        with record_collectives() as records:
            result = run(x)
            result.exp().sum().backward()
        found.append((result.detach(), x.grad))
        sequences.append(canonical(records))
    torch.testing.assert_close(found[1], found[0])
    return sequences[0], sequences[1]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_collectives_in_a_program_s_own_backward(two_ranks: Ranks, backend: str) -> None:
    results = two_ranks.run(_own_function, backend, deadline_s=180)
    assert results[0] == results[1]
    eager, compiled = results[0]
    assert len(eager) == 8
    assert compiled == eager


def _splits_from_tensors(backend: str) -> bool:
    torch._dynamo.config.capture_scalar_outputs = True
    try:
        group = fvops.get_sp_group()
        place, P = group.rank_in_group, group.world_size
        rows = [[1 + (i + j) % 3 for j in range(P)] for i in range(P)]
        sent, received = torch.tensor(rows[place]), torch.tensor([rows[j][place] for j in range(P)])

        def function(x: Tensor, sent: Tensor, received: Tensor) -> Tensor:
            return group.all_to_all_single(x * 1, received.tolist(), sent.tolist()) * 2

        x = torch.arange(float(sent.sum())) + 100 * place
        expected = function(x, sent, received)
        return torch.equal(torch.compile(function, fullgraph=True, backend=backend)(x, sent, received), expected)
    finally:
        torch._dynamo.config.capture_scalar_outputs = False


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_split_sizes_that_only_the_run_knows(two_ranks: Ranks, backend: str) -> None:
    assert two_ranks.run(_splits_from_tensors, backend, deadline_s=180) == [True, True]
