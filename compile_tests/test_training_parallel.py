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
from fvops.compiler import pass_log
from fvops.debug import canonical, record_collectives
from tests.harness import Ranks, init_fvops

# 1.3 MB of parameters: more than DDP's first bucket, which is 1 MB.
B, S, H, D = 1, 8, 4, 24
C = H * D


# All that `enable()` turns on; there is nothing to cancel in the model.
PASSES: dict[str, Any] = {"layout": "fused", "merge": True, "cancel": True, "overlap": True, "absorb": True}


class Block(nn.Module):
    """Attention and a feed-forward part on ``[B, S/P, C]``; alone it is plain attention on ``[B, S, C]``.

    Args:
        apart: exchange q, k and v one by one, for the passes to merge.
    """

    def __init__(self, alone: bool, apart: bool) -> None:
        super().__init__()
        self.alone, self.apart = alone, apart
        self.norm, self.qkv, self.out = nn.LayerNorm(C), nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.ffn = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (H, D)) for part in self.qkv(self.norm(x)).chunk(3, dim=2))
        if self.apart:
            q, k, v = (fvops.sequence_model_parallel_all_to_all_4D(y, 2, 1) for y in (q, k, v))
        elif not self.alone:
            q, k, v = fvops.get_sp_group().all_to_all_4D_coalesced([q, k, v])
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        if not self.alone:
            out = fvops.sequence_model_parallel_all_to_all_4D(out, 1, 2)
        x = x + self.out(out.flatten(2))
        return x + self.ffn(x)


class Model(nn.Module):
    """Whole sequences in and out on every rank."""

    def __init__(self, alone: bool, apart: bool) -> None:
        super().__init__()
        self.alone = alone
        self.embed, self.project = nn.Linear(C, C), nn.Linear(C, C)
        self.blocks = nn.ModuleList([Block(alone, apart) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if not self.alone:
            x, length = fvops.sequence_model_parallel_shard(x)
        for block in self.blocks:
            x = block(x)
        x = self.project(x)
        return x if self.alone else fvops.sequence_model_parallel_all_gather_with_unpad(x, length, dim=1)


def _model(alone: bool, apart: bool = False) -> Model:
    torch.manual_seed(5)
    return Model(alone, apart).double()


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


# What a model is compiled with; None: it is left in eager.
Options = dict[str, Any] | None


def _with_ddp(model: Model, options: Options) -> nn.Module:
    # Two buckets: two graphs under Dynamo's DDPOptimizer, with exchanges in both.
    wrapped = DistributedDataParallel(model, process_group=dist.group.WORLD, bucket_cap_mb=1)
    return wrapped if options is None else torch.compile(wrapped, options=options)


def _with_ddp_in_one_graph(model: Model, options: Options) -> nn.Module:
    if options is not None:
        model.compile(fullgraph=True, options=options)
    return DistributedDataParallel(model, process_group=dist.group.WORLD)


def _with_fsdp(model: Model, options: Options) -> nn.Module:
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    for block in model.blocks:
        if options is not None:
            block.compile(fullgraph=True, options=options)
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WAYS: dict[str, Callable[[Model, Options], nn.Module]] = {
    "ddp": _with_ddp,
    "ddp_one_graph": _with_ddp_in_one_graph,
    "fsdp2": _with_fsdp,
}


def _train(
    way: str, sp_size: int, passes: dict[str, Any] | None = None, inductor: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Two steps eager and compiled; what each sent, and how far its gradients are from one rank's.

    Args:
        passes: arguments of `fvops.compiler.options`; None: the defaults, and q, k and v go in one call in eager too.
        inductor: more of Inductor's options.
    """
    fvops.cleanup_dist_env_and_memory()
    init_fvops(sp_size=sp_size, suffix="-train")
    batches = fvops.get_world_size() // sp_size
    expected = _expected(batches)
    x, target = _batch(fvops.get_world_rank() // sp_size)
    found: dict[str, Any] = {}
    options = {**(fvops.compiler.options(**passes) if passes else {}), **(inductor or {})}
    for chosen in (None, options):
        torch._dynamo.reset()
        model = WAYS[way](_model(alone=False, apart=passes is not None), chosen)
        for _step in range(2):
            model.zero_grad()
            with record_collectives() as records, pass_log() as notes:
                F.mse_loss(model(x), target).backward()
            found.setdefault("passes", set()).update(note.name for note in notes)
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


def _check(found: list[dict[str, Any]], passes: dict[str, Any] | None = None) -> None:
    # A block sends q, k, v and the output and back; the gather at the end and the shard's gradient at the beginning.
    group, merged = "sp:0", ["all_to_all_4D_coalesced", "all_to_all_4D"]
    # Of all ranks together: one that finds its peer's graph in the cache does not tell.
    told = set().union(*(one["passes"] for one in found))
    assert told == ({"layout", "merge", "overlap", "absorb"} if passes else set())
    for rank, one in enumerate(found):
        assert one["graphs"] >= 1, f"rank {rank} has compiled nothing"
        for step, (sent, error) in enumerate(zip(one["sent"], one["errors"], strict=True)):
            where = f"rank {rank}, {'eager' if step < 2 else 'compiled'} step {step % 2}"
            block = ["all_to_all_4D"] * 4 if passes and step < 2 else merged
            forward = [*block, *block, "all_gather"]
            backward = ["reduce_scatter", *block[::-1], *block[::-1], "all_gather"]
            assert [op for _, op, _ in sent] == forward + backward, where
            assert {name for name, _, _ in sent} == {group}, where
            assert sent == one["sent"][step - step % 2 if passes else 0], where
            assert sum(nbytes for _, _, nbytes in sent) == sum(nbytes for _, _, nbytes in one["sent"][0]), where
            assert error < 1e-12, where


# One graph under DDP is what the other two ways hold as well.
@pytest.mark.parametrize("way", ["ddp", pytest.param("ddp_one_graph", marks=pytest.mark.slow), "fsdp2"])
def test_two_ranks_share_a_sequence(way: str) -> None:
    _check(Ranks.get(2).run(_train, way, 2, deadline_s=400))


def test_with_the_passes_on() -> None:
    """The passes on, forward and backward; what lies between exchanges runs as aten calls, which compile fast."""
    aten_between = {"fallback_by_default": True}
    _check(Ranks.get(2).run(_train, "fsdp2", 2, PASSES, aten_between, deadline_s=400), PASSES)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_with_the_passes_on_and_kernels_between(way: str) -> None:
    _check(Ranks.get(2).run(_train, way, 2, PASSES, deadline_s=400), PASSES)


@pytest.mark.slow
@pytest.mark.parametrize("passes", [None, PASSES], ids=["defaults", "passes"])
@pytest.mark.parametrize("way", WAYS)
def test_two_sequences_over_four_ranks(way: str, passes: dict[str, Any] | None) -> None:
    _check(Ranks.get(4).run(_train, way, 2, passes, deadline_s=900), passes)
