"""overlap at run time: timestamps of starts, matrix products and waits, in forward and backward, on real ranks.

Only the order of events is looked at, never how long one took.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fvops
from compile_tests.meeting import meet, wait_for
from tests.harness import Ranks

START, WAIT, WHOLE = "fvops::all_to_all_4D_start", "fvops::all_to_all_4D_wait", "fvops::all_to_all_4D"
PRODUCTS = ("aten::mm", "aten::addmm")
# What happened, when it began and when it ended.
Event = tuple[str, float, float]


def _two_branches(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """In forward the first branch is projected while the second one's exchange travels.

    In backward the first exchange that starts has the other branch's products and the weight's gradient beside it, the
    second one comes when all products are done.
    """
    group = fvops.get_sp_group()
    one, other = (group.all_to_all_4D(y, 2, 1).flatten(0, 2) for y in (x.sin(), x.cos()))
    return F.linear(one, weight, bias).cos() + F.linear(other, weight, bias).sin()


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(fvops.get_sp_group().rank_in_group)
    x, weight, bias = (torch.rand(size, generator=generator) for size in ((1, 4, 16, 5), (7, 5), (7,)))
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def _profiled(call: Any) -> tuple[Any, list[Event]]:
    """What `call` returns, and its exchanges and products by the time at which they began."""
    with torch.profiler.profile() as profile:
        result = call()
    events = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profile.events() or ()
        if event.name in (START, WAIT, WHOLE, *PRODUCTS)
    ]
    # An addmm may call mm.
    outer = [one for one in events if not any(_within(one, other) for other in events if one is not other)]
    return result, sorted(outer, key=lambda event: event[1])


def _within(inner: Event, outer: Event) -> bool:
    return outer[1] <= inner[1] and inner[2] <= outer[2] and outer[2] - outer[1] > inner[2] - inner[1]


def _one_step(overlap: bool) -> tuple[list[Event], list[Event]]:
    """The events of forward and of backward; values and gradients are as eager's."""
    options = fvops.compiler.options(overlap=overlap)
    compiled = torch.compile(_two_branches, fullgraph=True, options=options)
    inputs = _inputs()
    torch.autograd.grad(compiled(*inputs).sum(), inputs)  # compiles
    result, forward = _profiled(lambda: compiled(*inputs))
    gradients, backward = _profiled(lambda: torch.autograd.grad(result.sum(), inputs))
    wanted = _two_branches(*inputs)
    torch.testing.assert_close(result, wanted)
    torch.testing.assert_close(gradients, torch.autograd.grad(wanted.sum(), inputs))
    return forward, backward


def _computed_meanwhile(events: list[Event]) -> list[int]:
    """For each exchange, in order of their starts, how many products ran after its start and before its wait."""
    starts, waits = ([event for event in events if event[0] == name] for name in (START, WAIT))
    assert len(starts) == len(waits)
    products = [event for event in events if event[0] in PRODUCTS]
    # Of one group: they are waited for in the order in which they were started.
    return [
        sum(start[2] <= product[1] and product[2] <= wait[1] for product in products)
        for start, wait in zip(starts, waits, strict=True)
    ]


def test_products_run_between_start_and_wait(two_ranks: Ranks) -> None:
    for forward, backward in two_ranks.run(_one_step, True, deadline_s=300):
        assert WHOLE not in [event[0] for event in forward + backward]
        assert _computed_meanwhile(forward) == [0, 1], forward
        first, _ = _computed_meanwhile(backward)
        assert first >= 1, backward


@pytest.mark.slow
def test_without_overlap_nothing_is_split(two_ranks: Ranks) -> None:
    for forward, backward in two_ranks.run(_one_step, False, deadline_s=300):
        for events in (forward, backward):
            names = [event[0] for event in events]
            assert (names.count(WHOLE), names.count(START), names.count(WAIT)) == (2, 0, 0), events


class _MeetInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, place: int) -> Tensor:
        ctx.place = place
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return meet(gradients[0], "met in backward", ctx.place), None


def _meeting_in_backward(overlap: bool) -> bool:
    """Rank 1 begins its backward pass only once rank 0 has the gradient that it computes between start and wait."""
    group = fvops.get_sp_group()
    place = group.rank_in_group

    def program(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # Before the exchange here, so that backward comes to it after the exchange.
        weight = _MeetInBackward.apply(weight, place)
        return F.linear(group.all_to_all_4D(x.sin(), 2, 1).flatten(0, 2), weight, bias).cos()

    inputs = _inputs()
    compiled = torch.compile(program, fullgraph=True, options=fvops.compiler.options(overlap=overlap))
    result = compiled(*inputs).sum()
    if place == 1:
        wait_for("met in backward")
    gradients = torch.autograd.grad(result, inputs)
    wanted = torch.autograd.grad(program(*inputs).sum(), inputs)
    torch.testing.assert_close(gradients, wanted)
    return True


@pytest.mark.slow
def test_backward_computes_while_the_exchange_is_under_way(two_ranks: Ranks) -> None:
    """Without overlap rank 0 would wait in the exchange for rank 1, which waits for what rank 0 computes after it."""
    assert two_ranks.run(_meeting_in_backward, True, deadline_s=300) == [True, True]
