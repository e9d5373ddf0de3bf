"""Sequence parallelism under DDP and under FSDP2: gradients and collectives of a compiled training step.

The reference is the same model on one rank, in plain attention without a collective. All in float64, so that only a
wrong gradient can differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fvops
from fvops.debug import canonical, record_collectives
from tests.harness import Ranks, init_fvops

# 1.3 MB of parameters: more than DDP's first bucket, which is 1 MB.
B, S, H, D = 1, 8, 4, 24
C = H * D


class Block(nn.Module):
    """Attention and a feed-forward part on ``[B, S/P, C]``; alone it is plain attention on ``[B, S, C]``."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.alone = alone
        self.norm, self.qkv, self.out = nn.LayerNorm(C), nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.ffn = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (H, D)) for part in self.qkv(self.norm(x)).chunk(3, dim=2))
        if not self.alone:
            q, k, v = fvops.get_sp_group().all_to_all_4D_coalesced([q, k, v])
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        if not self.alone:
            out = fvops.sequence_model_parallel_all_to_all_4D(out, 1, 2)
        x = x + self.out(out.flatten(2))
        return x + self.ffn(x)


class Model(nn.Module):
    """Whole sequences in and out on every rank."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.alone = alone
        self.embed, self.project = nn.Linear(C, C), nn.Linear(C, C)
        self.blocks = nn.ModuleList([Block(alone) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if not self.alone:
            x, length = fvops.sequence_model_parallel_shard(x)
        for block in self.blocks:
            x = block(x)
        x = self.project(x)
        return x if self.alone else fvops.sequence_model_parallel_all_gather_with_unpad(x, length, dim=1)


def _model(alone: bool) -> Model:
    torch.manual_seed(5)
    return Model(alone).double()


def _batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x, target = (torch.randn(B, S, C, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, target


def _expected(batches: int) -> dict[str, Tensor]:
    """The gradients of one rank, averaged over the batches."""
    model = _model(alone=True)
    for number in range(batches):
        x, target = _batch(number)
        (F.mse_loss(model(x), target) / batches).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _with_ddp(model: Model, compiled: bool) -> nn.Module:
    # Two buckets: two graphs under Dynamo's DDPOptimizer, with exchanges in both.
    wrapped = DistributedDataParallel(model, process_group=dist.group.WORLD, bucket_cap_mb=1)
    return torch.compile(wrapped) if compiled else wrapped


def _with_ddp_in_one_graph(model: Model, compiled: bool) -> nn.Module:
    if compiled:
        model.compile(fullgraph=True)
    return DistributedDataParallel(model, process_group=dist.group.WORLD)


def _with_fsdp(model: Model, compiled: bool) -> nn.Module:
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    for block in model.blocks:
        if compiled:
            block.compile(fullgraph=True)
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WAYS: dict[str, Callable[[Model, bool], nn.Module]] = {
    "ddp": _with_ddp,
    "ddp_one_graph": _with_ddp_in_one_graph,
    "fsdp2": _with_fsdp,
}


def _train(way: str, sp_size: int) -> dict[str, Any]:
    """Two steps eager and compiled; what each sent, and how far its gradients are from one rank's."""
    fvops.cleanup_dist_env_and_memory()
    init_fvops(sp_size=sp_size, suffix="-train")
    batches = fvops.get_world_size() // sp_size
    expected = _expected(batches)
    x, target = _batch(fvops.get_world_rank() // sp_size)
    found: dict[str, Any] = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        model = WAYS[way](_model(alone=False), compiled)
        for _step in range(2):
            model.zero_grad()
            with record_collectives() as records:
                F.mse_loss(model(x), target).backward()
            # A second step with other gradients than the first would show a graph that keeps state.
            found.setdefault("sent", []).append(canonical(records))
            found.setdefault("errors", []).append(_largest_error(model, expected))
        found["graphs"] = counters["stats"]["unique_graphs"]
    fvops.cleanup_dist_env_and_memory()
    return found


def _largest_error(model: nn.Module, expected: dict[str, Tensor]) -> float:
    errors = []
    for name, parameter in model.named_parameters():
        plain = name.replace("_orig_mod.", "").removeprefix("module.")
        grad = parameter.grad
        if grad is None:
            raise AssertionError(f"{plain} has no gradient")
        whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
        errors.append(float((whole - expected[plain]).abs().max() / expected[plain].abs().max()))
    if len(errors) != len(expected):
        raise AssertionError(f"{len(errors)} gradients, expected {len(expected)}")
    return max(errors)


def _check(found: list[dict[str, Any]]) -> None:
    # A block sends q, k, v and the output and back; the gather at the end and the shard's gradient at the beginning.
    group, block = "sp:0", ["all_to_all_4D_coalesced", "all_to_all_4D"]
    forward = [*block, *block, "all_gather"]
    backward = ["reduce_scatter", *block[::-1], *block[::-1], "all_gather"]
    for rank, one in enumerate(found):
        assert one["graphs"] >= 1, f"rank {rank} has compiled nothing"
        for step, (sent, error) in enumerate(zip(one["sent"], one["errors"], strict=True)):
            where = f"rank {rank}, {'eager' if step < 2 else 'compiled'} step {step % 2}"
            assert [op for _, op, _ in sent] == forward + backward, where
            assert {name for name, _, _ in sent} == {group}, where
            assert sent == one["sent"][0], where
            assert error < 1e-12, where


# One graph under DDP is what the other two ways hold as well.
@pytest.mark.parametrize("way", ["ddp", pytest.param("ddp_one_graph", marks=pytest.mark.slow), "fsdp2"])
def test_two_ranks_share_a_sequence(way: str) -> None:
    _check(Ranks.get(2).run(_train, way, 2, deadline_s=400))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_sequences_over_four_ranks(way: str) -> None:
    _check(Ranks.get(4).run(_train, way, 2, deadline_s=900))
