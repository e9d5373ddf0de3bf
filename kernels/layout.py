"""The layouts that exchanges send and receive, in plain torch: the reference for every other kernel.

A send or receive buffer is *rank-major*: its first dim is the peer, so that each peer's part is one contiguous run. The
functions here give the rank-major *view* of a tensor, each for one way in which it is split over the ranks; the view of
an input, made contiguous, is what is sent, and what is received is laid down through the view of the output. Where the
view is contiguous already (at B=1, one side of each 4D exchange) nothing is copied.

Letters: P world size, B batch, S sequence, H heads, D head size, h = H/P, s = S/P.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "chunks_by_rank",
    "exchange_by_rank",
    "heads_by_rank",
    "receive_buffer",
    "sequence_by_rank",
    "unpacked_shape",
]


def heads_by_rank(x_BSHD: Tensor, world_size: int) -> Tensor:
    """``[B, S, P*h, D] -> [P, B, S, h, D]``: rank r has heads ``r*h:(r+1)*h``."""
    B, S, H, D = x_BSHD.shape
    return x_BSHD.view(B, S, world_size, H // world_size, D).permute(2, 0, 1, 3, 4)


def sequence_by_rank(x_BSHD: Tensor, world_size: int) -> Tensor:
    """``[B, P*s, H, D] -> [P, B, s, H, D]``: rank r has rows ``r*s:(r+1)*s``. In memory order at B=1."""
    B, S, H, D = x_BSHD.shape
    return x_BSHD.view(B, world_size, S // world_size, H, D).permute(1, 0, 2, 3, 4)


def exchange_by_rank(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], scatter_dim: int, world_size: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The rank-major views of what an ``all_to_all_4D`` fills and reads: heads on the one side, rows on the other."""
    fills, reads = (sequence_by_rank, heads_by_rank) if scatter_dim == 2 else (heads_by_rank, sequence_by_rank)
    return [fills(output, world_size) for output in outputs], [reads(input_, world_size) for input_ in inputs]


def unpacked_shape(packed_shape: Sequence[int], dim: int) -> tuple[int, int, int, int]:
    """The ``[B, S, H, D]`` whose `heads_by_rank` (`dim` 2) or `sequence_by_rank` (`dim` 1) has `packed_shape`."""
    P, B, S, H, D = packed_shape
    return (B, S, P * H, D) if dim == 2 else (B, P * S, H, D)


def chunks_by_rank(x: Tensor, dim: int, world_size: int) -> Tensor:
    """``[..., P*n, ...] -> [P, ..., n, ...]``: rank r has slice ``r*n:(r+1)*n`` of `dim`. In memory order for dim 0."""
    shape = x.shape
    parts = x.view(*shape[:dim], world_size, shape[dim] // world_size, *shape[dim + 1 :])
    return parts.movedim(dim, 0) if dim else parts


def receive_buffer(parts: Tensor) -> Tensor:
    """Contiguous memory for what is received into `parts`, the rank-major view of an output: the view itself if it can.

    When it cannot, the caller copies the buffer through the view afterwards.
    """
    return parts if parts.is_contiguous() else torch.empty(parts.shape, dtype=parts.dtype, device=parts.device)
