"""Activation checkpointing: a compiled region sends once, its backward replays computation only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fvops
from fvops.debug import canonical, record_collectives
from tests.harness import Ranks


def _block(x: Tensor) -> Tensor:
    """Exchanges, and a send and receive that no gradient flows through, inside the region."""
    group = fvops.get_sp_group()
    y = group.all_to_all_4D(x.sin(), 2, 1)
    group.send(y.detach()[0, 0])
    other = group.recv(y.shape[2:], y.dtype)
    return group.all_to_all_4D((y.cos() + other).sin(), 1, 2).exp()


def _run(selective: bool, compiled: bool, backend: str, reentrant: bool) -> tuple[Tensor, list[str]]:
    arguments: dict[str, Any] = {"context_fn": fvops.compiler.checkpoint_context_fn} if selective else {}

    def function(x: Tensor) -> Tensor:
        return checkpoint(_block, x, use_reentrant=reentrant, **arguments).sin()

    x = torch.rand(1, 4, 4, 2, generator=torch.Generator().manual_seed(fvops.get_sp_group().rank_in_group))
    x.requires_grad_()
    if compiled:
        function = torch.compile(function, backend=backend, fullgraph=True)
    with record_collectives() as records:
        function(x).sum().backward()
    assert x.grad is not None
    return x.grad, [op for _, op, _ in canonical(records)]


def _both(selective: bool, backend: str, reentrant: bool = False) -> tuple[list[str], list[str]]:
    expected, eager = _run(selective, False, backend, reentrant)
    got, compiled = _run(selective, True, backend, reentrant)
    torch.testing.assert_close(got, expected)
    return eager, compiled


FORWARD = ["all_to_all_4D", "send", "recv", "all_to_all_4D"]
BACKWARD = ["all_to_all_4D", "all_to_all_4D"]


@pytest.mark.parametrize(
    ("selective", "backend"),
    [
        (False, "aot_eager"),
        (False, "inductor"),
        (True, "aot_eager"),
        pytest.param(True, "inductor", marks=pytest.mark.slow),
    ],
)
def test_results_are_saved_not_received_again(two_ranks: Ranks, selective: bool, backend: str) -> None:
    for eager, compiled in two_ranks.run(_both, selective, backend, deadline_s=200):
        assert compiled == FORWARD + BACKWARD
        # Eager repeats a plain region whole; with our context_fn it repeats no collective.
        assert eager == FORWARD + ([] if selective else FORWARD) + BACKWARD


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_reentrant_region_too(two_ranks: Ranks, backend: str) -> None:
    for eager, compiled in two_ranks.run(_both, False, backend, True, deadline_s=200):
        assert compiled == FORWARD + BACKWARD
        assert eager == FORWARD + FORWARD + BACKWARD
