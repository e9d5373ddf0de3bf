"""Activation checkpointing: a compiled region sends once, its backward replays computation only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fvops
from fvops.compiler import pass_log
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


# Every pass that keeps what is sent in eager's order.
PASSES: dict[str, Any] = {"layout": "fused", "merge": True, "overlap": True, "absorb": True}


def _attention(x: Tensor, weight: Tensor) -> Tensor:
    """Exchanges to be merged, opened up and split, and a projection that reads received parts."""
    group = fvops.get_sp_group()
    q, k, v = (group.all_to_all_4D(y, 2, 1) for y in (x.sin(), x * 2, x.cos()))
    local = x @ weight[:2, :2]
    out = group.all_to_all_4D((q @ k.mT).tanh() @ v, 1, 2)
    return (out.flatten(2) @ weight).exp() * local.sum()


def _with_passes(reentrant: bool, selective: bool, inductor: dict[str, Any]) -> tuple[list[str], list[str], set[str]]:
    """What eager issues and what compiled code does; the passes that did something. Values and gradients are equal."""
    arguments: dict[str, Any] = {"context_fn": fvops.compiler.checkpoint_context_fn} if selective else {}

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return checkpoint(_attention, x, weight, use_reentrant=reentrant, **arguments).sin()

    compiled = torch.compile(function, fullgraph=True, options={**fvops.compiler.options(**PASSES), **inductor})
    generator = torch.Generator().manual_seed(fvops.get_sp_group().rank_in_group)
    sizes = (1, 4, 4, 2), (8, 6)
    values = [torch.rand(size, generator=generator, dtype=torch.float64) for size in sizes]
    found, sequences = [], []
    with pass_log() as notes:
        for run in (function, compiled):
            leaves = [value.clone().requires_grad_() for value in values]
            with record_collectives() as records:
                result = run(*leaves)
                result.sum().backward()
            found.append([result.detach(), *(leaf.grad for leaf in leaves)])
            sequences.append([op for _, op, _ in canonical(records)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
    return sequences[0], sequences[1], {note.name for note in notes}


# What lies between exchanges as aten calls: they compile fast.
ATEN_BETWEEN = {"fallback_by_default": True}


@pytest.mark.parametrize(
    ("reentrant", "selective", "inductor"),
    [
        (False, False, ATEN_BETWEEN),
        (True, False, ATEN_BETWEEN),
        pytest.param(False, False, {}, marks=pytest.mark.slow),
        pytest.param(True, False, {}, marks=pytest.mark.slow),
        pytest.param(False, True, {}, marks=pytest.mark.slow),
    ],
)
def test_with_the_passes_on(two_ranks: Ranks, reentrant: bool, selective: bool, inductor: dict[str, Any]) -> None:
    results = two_ranks.run(_with_passes, reentrant, selective, inductor, deadline_s=300)
    for eager, compiled, _ in results:
        assert eager == ["all_to_all_4D"] * (8 if selective else 12)
        assert compiled == ["all_to_all_4D_coalesced", "all_to_all_4D", "all_to_all_4D", "all_to_all_4D_coalesced"]
    # Of both ranks together: one that finds its peer's graph in the cache does not tell.
    assert set().union(*(passes for _, _, passes in results)) == {"layout", "merge", "overlap", "absorb"}


def _undone(x: Tensor, weight: Tensor) -> Tensor:
    """An exchange and its inverse, products on both sides."""
    group = fvops.get_sp_group()
    received = group.all_to_all_4D((x @ weight).sin(), 2, 1)
    return ((group.all_to_all_4D(received.exp().sin(), 1, 2).cos() @ weight).tanh() @ weight).sin()


def _cancelled(reentrant: bool) -> list[tuple[list[str], int]]:
    """What is issued and how many tensors are saved, without `cancel` and with it; values and gradients are eager's."""

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return checkpoint(_undone, x, weight, use_reentrant=reentrant).cos()

    generator = torch.Generator().manual_seed(fvops.get_sp_group().rank_in_group)
    values = [torch.rand(size, generator=generator, dtype=torch.float64) for size in ((1, 4, 4, 6), (6, 6))]
    found, told = [], []
    for cancel in (None, False, True):
        options = {**fvops.compiler.options(cancel=bool(cancel)), **ATEN_BETWEEN}
        run = function if cancel is None else torch.compile(function, fullgraph=True, options=options)
        leaves = [value.clone().requires_grad_() for value in values]
        with record_collectives() as records:
            result = run(*leaves)
            saved = [] if cancel is None else result.grad_fn.saved_tensors
            result.sum().backward()
        found.append([result.detach(), *(leaf.grad for leaf in leaves)])
        told.append(([op for _, op, _ in canonical(records)], len(saved)))
    for got in found[1:]:
        torch.testing.assert_close(got, found[0], rtol=1e-9, atol=1e-9)
    return told[1:]


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_cancel_drops_is_not_saved_either(two_ranks: Ranks, reentrant: bool) -> None:
    for (plain, saved), (cancelled, saved_without) in two_ranks.run(_cancelled, reentrant, deadline_s=200):
        assert plain == ["all_to_all_4D"] * 4
        assert cancelled == []
        assert saved_without < saved


class _Contexts:
    def __call__(self) -> Any:
        return fvops.compiler.checkpoint_context_fn()


def _refused(compiled: bool, arguments: dict[str, Any]) -> tuple[str, int]:
    """The error, and how many collectives were issued before it; afterwards the group still works."""

    def function(x: Tensor) -> Tensor:
        return checkpoint(_block, x, **arguments).sin()

    run = torch.compile(function, fullgraph=True) if compiled else function
    x = torch.rand(1, 4, 4, 2, requires_grad=True)
    error = ""
    with record_collectives() as records:
        try:
            run(x).sum().backward()
        except Exception as e:
            error = f"{type(e).__name__}: {e}"
    fvops.get_sp_group().all_reduce(x.detach())
    return error, len(records)


CONTEXTS = fvops.compiler.checkpoint_context_fn


@pytest.mark.parametrize(
    ("compiled", "arguments", "words"),
    [
        (
            False,
            {"use_reentrant": True, "context_fn": CONTEXTS},
            "`context_fn` or `debug` is only supported when use_reentrant=False",
        ),
        pytest.param(
            True,
            {"use_reentrant": False, "debug": True},
            "debug=True is incompatible with non-default context_fn",
            marks=pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.11 compiles it"),
        ),
        (True, {"use_reentrant": False, "context_fn": _Contexts()}, "checkpoint not implemented for"),
    ],
    ids=["reentrant with context_fn, eager", "debug, compiled", "context_fn no function, compiled"],
)
def test_a_form_that_torch_refuses(two_ranks: Ranks, compiled: bool, arguments: dict[str, Any], words: str) -> None:
    """Torch's own words reach the user, before anything was sent."""
    for error, issued in two_ranks.run(_refused, compiled, arguments, deadline_s=200):
        assert words in error
        assert issued == 0
