"""One Ulysses self-attention block as in Wan, and the same with what others exchange by (`tools/bench_block.py`).

All share projections, RMSNorm, rotary embedding and attention, and differ in what stands between.

Letters: B batch, S the rank's tokens, H heads, D head size, C = H*D channels, P world size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fvops

__all__ = ["DiffusersBlock", "UlyssesBlock", "UpstreamBlock", "attend"]


class UlyssesBlock(nn.Module):
    """``[B, S, C] -> [B, S, C]``, this rank's tokens; by fvops: an exchange each of q, k, v and of the result."""

    def __init__(self, heads: int, head_size: int) -> None:
        super().__init__()
        self.heads, self.head_size = heads, head_size
        channels = heads * head_size
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(channels, channels) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(channels, eps=1e-6), nn.RMSNorm(channels, eps=1e-6)

    def input_sizes(self, batch: int, tokens: int) -> list[tuple[int, ...]]:
        """Of what `forward` takes, with `tokens` on this rank."""
        return [(batch, tokens, self.heads * self.head_size), *[(1, tokens, 1, self.head_size)] * 2]

    def forward(self, x_BSC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`sin` carries the signs of the rotation, minus at even places."""
        size = (self.heads, self.head_size)
        q_BSHD = _rotate(self.norm_q(self.to_q(x_BSC)).unflatten(2, size), cos, sin)
        k_BSHD = _rotate(self.norm_k(self.to_k(x_BSC)).unflatten(2, size), cos, sin)
        out_BSHD = self.exchange_and_attend(q_BSHD, k_BSHD, self.to_v(x_BSC).unflatten(2, size))
        return self.to_out(out_BSHD.flatten(2))

    def exchange_and_attend(self, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
        """This rank's tokens with all heads, in and out."""
        group = fvops.get_sp_group()
        q_BSHD, k_BSHD, v_BSHD = (group.all_to_all_4D(y_BSHD, 2, 1) for y_BSHD in (q_BSHD, k_BSHD, v_BSHD))
        return group.all_to_all_4D(attend(q_BSHD, k_BSHD, v_BSHD), 1, 2)


def attend(q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    """Attention over all tokens with the heads that are here."""
    q, k, v = (y_BSHD.transpose(1, 2) for y_BSHD in (q_BSHD, k_BSHD, v_BSHD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _rotate(x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # Flipped, not stacked out of two halves: on CPU, Inductor gives every stack or cat a buffer of its own.
    swapped_BSHD = x_BSHD.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x_BSHD * cos + swapped_BSHD * sin


class DiffusersBlock(UlyssesBlock):
    """By diffusers' own Ulysses attention, over gloo: the function that its Wan processor calls."""

    def __init__(self, heads: int, head_size: int) -> None:
        super().__init__(heads, head_size)
        from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig

        P = dist.get_world_size()
        context = ContextParallelConfig(ulysses_degree=P)
        mesh = dist.device_mesh.init_device_mesh("cpu", context.mesh_shape, mesh_dim_names=context.mesh_dim_names)
        self.parallel = ParallelConfig(context_parallel_config=context)
        self.parallel.setup(dist.get_rank(), P, torch.device("cpu"), mesh=mesh)

    def exchange_and_attend(self, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        dispatch: Any = dispatch_attention_fn
        return dispatch(q_BSHD, k_BSHD, v_BSHD, backend="native", parallel_config=self.parallel)


class UpstreamBlock(UlyssesBlock):
    """By the steps of FastVideo's attention layer, over gloo: q, k and v concatenated, heads-first buffers.

    The layer is hidden from the compiler, so that the graph breaks around it. Written by us from its layouts.
    """

    @torch.compiler.disable
    def exchange_and_attend(self, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
        qkv_BSHD = _HeadsFirst.apply(torch.cat([q_BSHD, k_BSHD, v_BSHD]), True)
        return _HeadsFirst.apply(attend(*qkv_BSHD.chunk(3)), False)


class _HeadsFirst(torch.autograd.Function):
    """The 4D exchange with a copy in front of it and two behind it."""

    @staticmethod
    def forward(ctx: Any, x_BSHD: Tensor, scatter_heads: bool) -> Tensor:
        ctx.scatter_heads = scatter_heads
        return _scatter_heads(x_BSHD) if scatter_heads else _gather_heads(x_BSHD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _HeadsFirst.apply(grads[0], not ctx.scatter_heads), None


def _scatter_heads(x_BSHD: Tensor) -> Tensor:
    received = _all_to_all(x_BSHD.transpose(0, 2).contiguous())  # [H, S, B, D]: a rank's heads are one run
    return torch.cat(received.chunk(dist.get_world_size()), dim=1).transpose(0, 2).contiguous()


def _gather_heads(x_BSHD: Tensor) -> Tensor:
    P = dist.get_world_size()
    parts = x_BSHD.transpose(0, 2).chunk(P, dim=1)  # [H/P, S, B, D] for each rank
    received = _all_to_all(torch.cat(parts))
    return received.transpose(0, 2).contiguous()


def _all_to_all(send: Tensor) -> Tensor:
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send)
    return received
