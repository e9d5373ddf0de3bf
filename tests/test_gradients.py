"""Gradients over several ranks, against vector-Jacobian products written by plain indexing over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.harness import Ranks

# How the collective is called, and on what: by the group, by the op, or by the device communicator.
WAYS = ("coordinator", "op", "communicator", "function")


def _whole_numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).double()


def _call(name: str, way: str, x: Tensor, args: dict[str, Any]) -> Tensor:
    import torch.distributed as dist

    import fvops
    from fvops.device_communicators.base_device_communicator import DistributedAutograd

    group = fvops.get_sp_group()
    P, tail = group.world_size, (group.world_size, group.unique_name)
    if way == "op":
        extra = (group.rank_in_group,) if name == "shard" else ()
        return getattr(torch.ops.fvops, name)(x, *args.values(), *extra, *tail)
    if way == "function":
        pg = group.device_group
        return {
            "all_reduce": lambda: DistributedAutograd.AllReduce.apply(pg, x, args.get("op")),
            "all_gather": lambda: DistributedAutograd.AllGather.apply(pg, x, P, args.get("dim")),
            "all_to_all_4D": lambda: DistributedAutograd.AllToAll4D.apply(pg, x, P, *args.values()),
            "shard": lambda: DistributedAutograd.Slice.apply(pg, x, P, *args.values()),
        }[name]()
    if "op" in args:
        args = {**args, "op": {"sum": dist.ReduceOp.SUM, "avg": dist.ReduceOp.AVG}[args["op"]]}
    return getattr(group if way == "coordinator" else group.device_communicator, name)(x, **args)


def _gradient(
    name: str, way: str, shape: tuple[int, ...], by_rank: list[dict[str, Any]], dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[str]]:
    """This rank's input gradient, for an output gradient whose memory is not contiguous."""
    import fvops

    rank = fvops.get_sp_parallel_rank()
    x = _whole_numbers(shape, rank).to(dtype).requires_grad_()
    y = _call(name, way, x, by_rank[rank])
    grad = _output_gradient(tuple(y.shape), rank).to(dtype)
    order = list(reversed(range(grad.dim())))
    y.backward(grad.permute(order).contiguous().permute(order))
    assert x.grad is not None
    return x.grad, grad, [] if y.dtype == dtype and x.grad.dtype == dtype else ["wrong dtype"]


def _output_gradient(shape: tuple[int, ...], rank: int) -> Tensor:
    return _whole_numbers(shape, 50 + rank)


def _check(
    P: int,
    name: str,
    way: str,
    shapes: list[tuple[int, ...]],
    by_rank: list[dict[str, Any]],
    expected: Callable[[list[Tensor]], list[Tensor]],
) -> None:
    replies = Ranks.get(P).run(_gradient_of_shapes, name, way, shapes, by_rank)
    grads = [grad for _, grad, _ in replies]
    for (got, _, complaints), wanted in zip(replies, expected(grads), strict=True):
        assert not complaints
        torch.testing.assert_close(got, wanted, rtol=1e-15, atol=0)


def _gradient_of_shapes(
    name: str, way: str, shapes: list[tuple[int, ...]], by_rank: list[dict[str, Any]]
) -> tuple[Tensor, Tensor, list[str]]:
    import fvops

    return _gradient(name, way, shapes[fvops.get_sp_parallel_rank()], by_rank, torch.float64)


def _sum(grads: list[Tensor]) -> Tensor:
    total = torch.zeros_like(grads[0])
    for grad in grads:
        total += grad
    return total


@pytest.mark.parametrize("op", ["sum", "avg"])
@pytest.mark.parametrize("way", WAYS)
def test_all_reduce_gives_everyone_the_reduced_gradient(ranks: Ranks, way: str, op: str) -> None:
    P = ranks.world_size
    divisor = P if op == "avg" else 1
    _check(P, "all_reduce", way, [(3, 4)] * P, [{"op": op}] * P, lambda grads: [_sum(grads) / divisor] * P)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("way", WAYS)
def test_all_gather(ranks: Ranks, way: str, dim: int) -> None:
    P = ranks.world_size
    shapes = [(2, 3, 2)] * P

    def expected(grads: list[Tensor]) -> list[Tensor]:
        return reference.gradient_of_movement(lambda x: reference.all_gather(x, dim), shapes, grads)

    _check(P, "all_gather", way, shapes, [{"dim": dim}] * P, expected)


@pytest.mark.parametrize("op", ["sum", "avg"])
@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("way", WAYS[:3])
def test_reduce_scatter(ranks: Ranks, way: str, dim: int, op: str) -> None:
    P = ranks.world_size

    def expected(grads: list[Tensor]) -> list[Tensor]:
        # Each element of rank r's slice is a sum to which every rank's element contributed.
        return [torch.cat(grads, dim) / (P if op == "avg" else 1)] * P

    _check(P, "reduce_scatter", way, [(2 * P, 3 * P)] * P, [{"op": op, "dim": dim}] * P, expected)


@pytest.mark.parametrize("dims", [(2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_all_to_all_4D(ranks: Ranks, way: str, dims: tuple[int, int]) -> None:
    P = ranks.world_size
    shapes = [(2, 2 * P, 3 * P, 2)] * P
    args = {"scatter_dim": dims[0], "gather_dim": dims[1]}

    def expected(grads: list[Tensor]) -> list[Tensor]:
        return reference.gradient_of_movement(lambda x: reference.all_to_all_4D(x, *dims), shapes, grads)

    _check(P, "all_to_all_4D", way, shapes, [args] * P, expected)


@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
@pytest.mark.parametrize("way", WAYS[:3])
def test_all_to_all_single(ranks: Ranks, way: str, even: bool) -> None:
    P = ranks.world_size
    rows = [[2] * P if even else [(j + 2 * r) % 4 for r in range(P)] for j in range(P)]
    shapes = [(sum(row), 3) for row in rows]
    sizes = [(None, None) if even else ([rows[j][r] for j in range(P)], rows[r]) for r in range(P)]
    by_rank = [{"output_split_sizes": received, "input_split_sizes": sent} for received, sent in sizes]

    def expected(grads: list[Tensor]) -> list[Tensor]:
        return reference.gradient_of_movement(lambda x: reference.all_to_all_single(x, rows), shapes, grads)

    _check(P, "all_to_all_single", way, shapes, by_rank, expected)


@pytest.mark.parametrize("scale_grad", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_shard_gathers_the_gradients(ranks: Ranks, way: str, scale_grad: bool) -> None:
    P = ranks.world_size
    args = {"dim": 1, "scale_grad": scale_grad}

    def expected(grads: list[Tensor]) -> list[Tensor]:
        return [torch.cat(grads, 1) / (P if scale_grad else 1)] * P

    _check(P, "shard", way, [(2, 3 * P)] * P, [args] * P, expected)


def test_broadcast_op_sums_the_gradients_on_src(ranks: Ranks) -> None:
    P = ranks.world_size
    shapes = [(3, 2)] * P
    for src in range(P):

        def expected(grads: list[Tensor], src: int = src) -> list[Tensor]:
            return reference.gradient_of_movement(lambda x: reference.broadcast(x, src), shapes, grads)

        _check(P, "broadcast", "op", shapes, [{"src": src}] * P, expected)


def test_reduce_op_broadcasts_the_gradient_of_dst(ranks: Ranks) -> None:
    P = ranks.world_size
    args = {"op": "sum", "dst": P - 1}
    _check(P, "reduce", "op", [(3, 2)] * P, [args] * P, lambda grads: [grads[P - 1]] * P)


def _second_order(shape: tuple[int, ...], dims: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The gradient, by the output gradient and by the input, of ``sum(grad_x ** 2)`` for ``y = exchange(x ** 3)``."""
    import fvops

    group = fvops.get_sp_group()
    x = _whole_numbers(shape, group.rank_in_group).requires_grad_()
    y = group.all_to_all_4D(x**3, *dims)
    grad_y = _output_gradient(tuple(y.shape), group.rank_in_group).requires_grad_()
    (grad_x,) = torch.autograd.grad(y, x, grad_y, create_graph=True)
    by_grad_y, by_x = torch.autograd.grad((grad_x**2).sum(), (grad_y, x))
    return by_grad_y, by_x


@pytest.mark.parametrize("dims", [(2, 1), (1, 2)], ids=str)
def test_all_to_all_4D_twice_differentiated(ranks: Ranks, dims: tuple[int, int]) -> None:
    P = ranks.world_size
    shape = (1, 2 * P, P, 2)
    x = [_whole_numbers(shape, rank) for rank in range(P)]
    out_shape = reference.all_to_all_4D(x, *dims)[0].shape
    grad_y = [_output_gradient(tuple(out_shape), rank) for rank in range(P)]
    back = reference.gradient_of_movement(lambda v: reference.all_to_all_4D(v, *dims), [shape] * P, grad_y)
    # grad_x = back * 3x^2, so d(sum grad_x^2)/d back = 2 back * 9x^4 and /dx = 2 grad_x * back * 6x.
    by_back = [2 * b * 9 * v**4 for b, v in zip(back, x, strict=True)]
    by_grad_y = reference.all_to_all_4D(by_back, *dims)
    for rank, (got_grad_y, got_x) in enumerate(ranks.run(_second_order, shape, dims)):
        torch.testing.assert_close(got_grad_y, by_grad_y[rank], rtol=1e-14, atol=0)
        wanted = 2 * (back[rank] * 3 * x[rank] ** 2) * back[rank] * 6 * x[rank]
        torch.testing.assert_close(got_x, wanted, rtol=1e-14, atol=0)


def _shard_with_padding(length: int) -> tuple[Tensor, Tensor, int, Tensor]:
    import fvops

    x = _whole_numbers((2, length, 3), 1).requires_grad_()
    piece, original = fvops.sequence_model_parallel_shard(x)
    whole = fvops.sequence_model_parallel_all_gather_with_unpad(piece, original, dim=1)
    weight = _whole_numbers((2, length, 3), 2)
    (whole * weight).sum().backward()
    assert x.grad is not None
    return piece.detach(), whole.detach(), original, x.grad


@pytest.mark.parametrize("length", [1, 5, 8])
def test_padded_shard_and_gather_are_the_identity_in_value_and_gradient(ranks: Ranks, length: int) -> None:
    """Every rank computes the same loss of the whole: the gradient, scaled by 1/P, is that of one process."""
    x = _whole_numbers((2, length, 3), 1)
    P = ranks.world_size
    padded_len = -(-length // P) * P
    padded = torch.cat([x, torch.zeros(2, padded_len - length, 3, dtype=x.dtype)], 1)
    for rank, (piece, whole, original, grad) in enumerate(ranks.run(_shard_with_padding, length)):
        assert original == length
        assert torch.equal(piece, reference.shard([padded] * P, 1)[rank])
        assert torch.equal(whole, x)
        torch.testing.assert_close(grad, _whole_numbers((2, length, 3), 2), rtol=1e-15, atol=0)


def _expanded_gradient() -> bool:
    """The gradient of ``sum()`` is one element, expanded."""
    import fvops

    group = fvops.get_sp_group()
    P = group.world_size
    x = torch.ones(1, P, P, 2, requires_grad=True)
    group.all_to_all_4D(x).sum().backward()
    group.all_gather(x, 1).sum().backward()
    assert x.grad is not None
    return bool((x.grad == 1 + P).all())


def test_an_expanded_output_gradient(ranks: Ranks) -> None:
    assert all(ranks.run(_expanded_gradient))


def _without_grad() -> list[bool]:
    import fvops

    group = fvops.get_sp_group()
    x = torch.ones(1, 1, group.world_size, 1, requires_grad=True)
    with torch.no_grad():
        plain = [group.all_to_all_4D(x).requires_grad, group.all_reduce(x).requires_grad]
    return [*plain, group.all_to_all_4D(x.detach()).requires_grad, not group.all_to_all_4D(x).requires_grad]


def test_nothing_is_recorded_for_autograd_without_need(two_ranks: Ranks) -> None:
    assert two_ranks.run(_without_grad) == [[False] * 4] * 2
