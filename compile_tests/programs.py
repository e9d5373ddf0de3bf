"""One small program for each data method, helper and getter, and how eager and compiled runs of it are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

import fvops
from fvops.debug import canonical, record_collectives

# x is [2, 2*P, 2*P, 3]; the input of each program. Those in TRAINING are differentiable in it.
Program = Callable[[Tensor], Any]


def _split_sizes(group: fvops.GroupCoordinator) -> tuple[list[int], list[int]]:
    """Rank r sends r+1+j rows... to rank j, cut from 2*P*P rows in all; what is left over goes to itself."""
    place, P = group.rank_in_group, group.world_size
    sent = [[(r + j) % 2 + 1 for j in range(P)] for r in range(P)]
    return [sent[j][place] for j in range(P)], sent[place]


def _uneven(x: Tensor) -> Tensor:
    group = fvops.get_sp_group()
    output_sizes, input_sizes = _split_sizes(group)
    rows = x.flatten(0, 1)[: sum(input_sizes)]
    return group.all_to_all_single(rows, output_sizes, input_sizes)


def _coalesced(x: Tensor) -> Tensor:
    """q, k and v with other shapes, strides and head counts; v's use comes before q's."""
    group = fvops.get_sp_group()
    q, k, v = x.sin(), x.transpose(0, 3).repeat(1, 1, 3, 1), x[:, :1]
    q, k, v = group.all_to_all_4D_coalesced([q, k, v], 2, 1)
    return v.sum() + q + k.mean()


def _ring(x: Tensor) -> Tensor:
    group = fvops.get_sp_group()
    group.send(x.detach()[0])
    first = group.recv(x.shape[1:], x.dtype)
    group.send(first * 2)
    return group.recv(x.shape[1:], x.dtype) + first


def _gather(x: Tensor) -> Tensor:
    gathered = fvops.get_sp_group().gather(x, 1, -1)
    return x + 1 if gathered is None else gathered.sin()


def _broadcast(x: Tensor) -> Tensor:
    buffer = x * 2
    fvops.get_sp_group().broadcast(buffer, src=1)
    return buffer + 1


def _barrier(x: Tensor) -> Tensor:
    fvops.get_sp_group().barrier()
    return x * 2


def _round_trip(x: Tensor) -> Tensor:
    shard, length = fvops.sequence_model_parallel_shard(x[:, :-1], 1)
    return fvops.sequence_model_parallel_all_gather_with_unpad(shard * 2, length, 1)


def _getters(x: Tensor) -> Tensor:
    groups = (fvops.get_world_group(), fvops.get_node_group(), fvops.get_tp_group(), fvops.get_dp_group())
    sizes = fvops.get_world_size() + fvops.get_sp_world_size() + fvops.get_tp_world_size() + fvops.get_dp_world_size()
    ranks = fvops.get_world_rank() + fvops.get_sp_parallel_rank() + fvops.get_tp_rank() + fvops.get_dp_rank()
    return x * sizes + ranks + sum(group.world_size + group.first_rank + group.next_rank for group in groups)


TRAINING: dict[str, Program] = {
    "all_reduce_sum": lambda x: fvops.get_sp_group().all_reduce(x),
    "all_reduce_avg": lambda x: fvops.get_sp_group().all_reduce(x.sin(), ReduceOp.AVG),
    "all_gather": lambda x: fvops.get_sp_group().all_gather(x.sin()),
    "all_gather_dim": lambda x: fvops.get_sp_group().all_gather(x.transpose(0, 1), 1),
    "reduce_scatter_sum": lambda x: fvops.get_sp_group().reduce_scatter(x.sin(), dim=1),
    "reduce_scatter_avg": lambda x: fvops.get_sp_group().reduce_scatter(x.sin(), ReduceOp.AVG, dim=2),
    "all_to_all_4D_heads": lambda x: fvops.get_sp_group().all_to_all_4D(x.sin(), 2, 1),
    "all_to_all_4D_sequence": lambda x: fvops.get_sp_group().all_to_all_4D(x.transpose(1, 2), 1, 2),
    "all_to_all_4D_coalesced": _coalesced,
    "all_to_all_single": lambda x: fvops.get_sp_group().all_to_all_single(x.transpose(0, 1)),
    "all_to_all_single_splits": _uneven,
    "shard": lambda x: fvops.get_sp_group().shard(x, 1, scale_grad=False),
    "shard_scaled": lambda x: fvops.get_sp_group().shard(x, 2, scale_grad=True),
    "broadcast_op": lambda x: torch.ops.fvops.broadcast(
        x.sin(), 1, fvops.get_sp_world_size(), fvops.get_sp_group().unique_name
    ),
    "helper_tp_all_reduce": lambda x: fvops.tensor_model_parallel_all_reduce(x.sin()),
    "helper_tp_all_gather": lambda x: fvops.tensor_model_parallel_all_gather(x.sin()),
    "helper_sp_all_to_all_4D": lambda x: fvops.sequence_model_parallel_all_to_all_4D(x.sin()),
    "helper_sp_all_gather": lambda x: fvops.sequence_model_parallel_all_gather(x.sin(), dim=0),
    "helper_sp_shard_round_trip": _round_trip,
}

INFERENCE: dict[str, Program] = {
    **TRAINING,
    "all_reduce_max": lambda x: fvops.get_sp_group().all_reduce(x, ReduceOp.MAX),
    "all_reduce_min": lambda x: fvops.get_sp_group().all_reduce(x, ReduceOp.MIN),
    "all_reduce_product": lambda x: fvops.get_sp_group().all_reduce(x, ReduceOp.PRODUCT),
    "all_reduce_none": lambda x: fvops.get_sp_group().all_reduce(x, op=None),
    "gather": _gather,
    "broadcast_in_place": _broadcast,
    "send_recv_ring": _ring,
    "barrier": _barrier,
    "getters": _getters,
}

BACKENDS = ("eager", "aot_eager", "inductor")

# Elementwise code that Inductor writes may differ from eager's in the last bits; what the transport carries does not.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def example(world_size: int, rank: int) -> Tensor:
    """An input that differs between ranks."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(2, 2 * world_size, 2 * world_size, 3, generator=generator)


def run(function: Program, x: Tensor, train: bool) -> tuple[list[Any], list[tuple[str, str, int]]]:
    """Results (with the input's gradient when training) and the collectives issued."""
    x = x.clone().requires_grad_(train)
    with record_collectives() as records:
        output = function(x)
        results = [output.detach()]
        if train:
            output.cos().sum().backward()
            results.append(x.grad)
    return results, canonical(records)


def compare(name: str, function: Program, compiled: Program, x: Tensor, train: bool) -> None:
    """AssertionError unless values and collectives agree."""
    expected, expected_records = run(function, x, train)
    got, got_records = run(compiled, x, train)
    if got_records != expected_records:
        raise AssertionError(f"{name}: eager issued {expected_records}, compiled issued {got_records}")
    for index, (e, g) in enumerate(zip(expected, got, strict=True)):
        what = f"{name}: result {index}"
        torch.testing.assert_close(g, e, **TOLERANCE, msg=lambda text, what=what: f"{what}: {text}")
        if g.stride() != e.stride() and g.numel():
            raise AssertionError(f"{what}: eager strides {e.stride()}, compiled {g.stride()}")
