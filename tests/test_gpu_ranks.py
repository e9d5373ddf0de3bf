"""The ops over gloo with 2 and 4 ranks that share one GPU, against the reference; the same bodies also on CPU tensors.

Each op is a test of its own: gloo has not the same support for CUDA tensors in every op and version.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.devices import GPU, on_device
from tests.draws import LAYOUTS, bits, make
from tests.harness import Ranks

DTYPES = (torch.bfloat16, torch.float32, torch.int64, torch.float8_e4m3fn)

CPU, CUDA = "process_group", "gpu-gloo"


@pytest.fixture(
    params=[
        pytest.param((CPU, 2), id="cpu-P2"),
        pytest.param((CUDA, 2), id="cuda-P2", marks=GPU),
        pytest.param((CUDA, 4), id="cuda-P4", marks=GPU),
    ]
)
def where(request: pytest.FixtureRequest) -> Ranks:
    transport, P = request.param
    return Ranks.get(P, transport)


def _input(shape: tuple[int, ...], dtype: torch.dtype, rank: int, number: int = 0) -> Tensor:
    """A rank's input: its layout differs from rank to rank, its numbers can be summed in any order."""
    layout = LAYOUTS[(rank + number) % len(LAYOUTS)]
    return make(shape, dtype, layout, 100 * rank + number, numbers=True)


def _call(op: str, shape: tuple[int, ...], dtype: torch.dtype, args: dict[str, Any]) -> tuple[Tensor | None, str]:
    """The op's result on this rank, and the type of the device that it ran on."""
    import fvops

    group = fvops.get_sp_group()
    result = getattr(group, op)(on_device(_input(shape, dtype, group.rank_in_group), group.device), **args)
    return None if result is None else result.cpu(), group.device.type


def _agree(ranks: Ranks, replies: list[Any], expected: list[Tensor | None]) -> None:
    wanted_device = "cuda" if ranks.transport == CUDA else "cpu"
    for rank, ((result, device), wanted) in enumerate(zip(replies, expected, strict=True)):
        assert device == wanted_device
        if wanted is None:
            assert result is None, rank
        else:
            assert result.shape == wanted.shape, rank
            assert torch.equal(bits(result), bits(wanted)), rank


def _check(
    ranks: Ranks,
    op: str,
    args: dict[str, Any],
    expected: Callable[[list[Tensor]], list[Any]],
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> None:
    P = ranks.world_size
    shape = (2, 3 * P, 2 * P, 5)
    for dtype in dtypes:
        replies = ranks.run(_call, op, shape, dtype, args)
        _agree(ranks, replies, expected([_input(shape, dtype, rank).contiguous() for rank in range(P)]))


@pytest.mark.parametrize("dims", [(2, 1), (1, 2)], ids=str)
def test_all_to_all_4D(where: Ranks, dims: tuple[int, int]) -> None:
    args = dict(zip(("scatter_dim", "gather_dim"), dims, strict=True))
    _check(where, "all_to_all_4D", args, lambda inputs: reference.all_to_all_4D(inputs, *dims))


def _coalesced(shapes: list[tuple[int, ...]], dims: tuple[int, int]) -> list[Tensor]:
    import fvops

    group = fvops.get_sp_group()
    rank = group.rank_in_group
    inputs = [on_device(_input(shape, DTYPES[i], rank, i), group.device) for i, shape in enumerate(shapes)]
    return [output.cpu() for output in group.all_to_all_4D_coalesced(inputs, *dims)]


@pytest.mark.parametrize("dims", [(2, 1), (1, 2)], ids=str)
def test_all_to_all_4D_coalesced(where: Ranks, dims: tuple[int, int]) -> None:
    P = where.world_size
    shapes = [(1, 2 * P, 4 * P, 8), (1, 2 * P, P, 8), (3, P, P, 5)]
    replies = where.run(_coalesced, shapes, dims)
    for i, shape in enumerate(shapes):
        inputs = [_input(shape, DTYPES[i], rank, i).contiguous() for rank in range(P)]
        for outputs, wanted in zip(replies, reference.all_to_all_4D(inputs, *dims), strict=True):
            assert torch.equal(bits(outputs[i]), bits(wanted)), i


def test_all_to_all_single(where: Ranks) -> None:
    P = where.world_size
    shape = (3 * P, 4)
    replies = where.run(_call, "all_to_all_single", shape, torch.bfloat16, {})
    inputs = [_input(shape, torch.bfloat16, rank).contiguous() for rank in range(P)]
    _agree(where, replies, reference.all_to_all_single(inputs, [[3] * P] * P))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_all_gather(where: Ranks, dim: int) -> None:
    _check(where, "all_gather", {"dim": dim}, lambda inputs: reference.all_gather(inputs, dim))


@pytest.mark.parametrize("dim", [1, 2])
def test_reduce_scatter(where: Ranks, dim: int) -> None:
    _check(
        where, "reduce_scatter", {"dim": dim}, lambda inputs: reference.reduce_scatter(inputs, "sum", dim), DTYPES[:3]
    )


def test_all_reduce(where: Ranks) -> None:
    _check(where, "all_reduce", {}, lambda inputs: reference.all_reduce(inputs, "sum"), DTYPES[:3])


def test_broadcast(where: Ranks) -> None:
    P = where.world_size
    replies = where.run(_broadcast, P - 1)
    inputs = [make((4, 5), torch.bfloat16, "offset", rank) for rank in range(P)]
    _agree(where, replies, reference.broadcast(inputs, P - 1))


def _broadcast(src: int) -> tuple[Tensor, str]:
    import fvops

    group = fvops.get_sp_group()
    x = on_device(make((4, 5), torch.bfloat16, "offset", group.rank_in_group), group.device)
    assert group.broadcast(x, src) is x
    return x.cpu(), group.device.type


def test_gather(where: Ranks) -> None:
    _check(where, "gather", {"dst": 1, "dim": 1}, lambda inputs: reference.gather(inputs, 1, 1))


def test_shard(where: Ranks) -> None:
    _check(where, "shard", {"dim": 2, "scale_grad": False}, lambda inputs: reference.shard(inputs, 2))


def _ring(numel: int) -> tuple[Tensor, str]:
    import fvops

    group = fvops.get_sp_group()
    x = on_device(make((numel,), torch.bfloat16, "strided", group.rank_in_group), group.device)
    group.send(x)
    x.zero_()  # what was sent is a copy
    return group.recv((numel,), torch.bfloat16).cpu(), group.device.type


@pytest.mark.parametrize("numel", [1, 1 << 20])
def test_a_ring_in_which_everyone_sends_first(where: Ranks, numel: int) -> None:
    P = where.world_size
    sent = [make((numel,), torch.bfloat16, "strided", rank) for rank in range(P)]
    _agree(where, where.run(_ring, numel), [sent[(rank - 1) % P] for rank in range(P)])


def _gradients() -> tuple[Tensor, str]:
    import fvops

    group = fvops.get_sp_group()
    P = group.world_size
    x = on_device(_input((1, 2, 2 * P, 3), torch.float32, group.rank_in_group), group.device).requires_grad_()
    y = group.all_to_all_4D(x, 2, 1)
    y.backward(torch.arange(y.numel(), dtype=y.dtype, device=y.device).view_as(y) + 1000 * group.rank_in_group)
    assert x.grad is not None
    return x.grad.cpu(), group.device.type


def test_the_gradient_of_all_to_all_4D(where: Ranks) -> None:
    P = where.world_size
    shape, received = (1, 2, 2 * P, 3), (1, 2 * P, 2, 3)
    grads = [torch.arange(12 * P).view(received) + 1000 * rank for rank in range(P)]
    expected = reference.gradient_of_movement(lambda x: reference.all_to_all_4D(x, 2, 1), [shape] * P, grads)
    _agree(where, where.run(_gradients), [grad.float() for grad in expected])


def _through_host() -> tuple[Tensor, str]:
    """The ring, by the way that CUDA tensors take over gloo."""
    import fvops
    from fvops import registry

    group = fvops.get_sp_group()
    transport = registry.resolve(group.unique_name, group.world_size).transport
    transport._through_host = True
    try:
        return _ring(1 << 12)
    finally:
        transport._through_host = False


def test_messages_through_host_memory() -> None:
    sent = [make((1 << 12,), torch.bfloat16, "strided", rank) for rank in range(2)]
    ranks = Ranks.get(2, CPU)
    _agree(ranks, ranks.run(_through_host), [sent[1], sent[0]])
