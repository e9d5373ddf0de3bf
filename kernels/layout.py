"""The layouts that exchanges send and receive, in plain torch: the reference for every other kernel.

A send or receive buffer is *rank-major*: its first dim is the peer, so that each peer's part is one contiguous run.
Letters: P world size, B batch, S sequence, H heads, D head size, h = H/P, s = S/P.

`pack_*` returns a contiguous tensor, which is the input's own memory when that is in the right order already (nothing
is copied then); `unpack_*` likewise returns the received memory when no copy is needed. What `unpack_*` returns always
has the strides of a newly allocated tensor of its shape, also in dims of size 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = [
    "pack_chunks",
    "pack_heads",
    "pack_sequence",
    "unpack_chunks",
    "unpack_heads",
    "unpack_sequence",
]


def pack_heads(x_BSHD: Tensor, world_size: int) -> Tensor:
    """``[B, s, H, D] -> [P, B, s, h, D]``: peer r gets heads ``r*h:(r+1)*h``."""
    B, S, H, D = x_BSHD.shape
    return x_BSHD.reshape(B, S, world_size, H // world_size, D).permute(2, 0, 1, 3, 4).contiguous()


def unpack_sequence(recv_PBSHD: Tensor) -> Tensor:
    """``[P, B, s, h, D] -> [B, P*s, h, D]``: the peers' sequence parts in rank order. No copy at B=1."""
    P, B, S, H, D = recv_PBSHD.shape
    return _fresh_strides(recv_PBSHD.permute(1, 0, 2, 3, 4), (B, P * S, H, D))


def pack_sequence(x_BSHD: Tensor, world_size: int) -> Tensor:
    """``[B, S, h, D] -> [P, B, s, h, D]``: peer r gets rows ``r*s:(r+1)*s``. No copy at B=1 of a contiguous tensor."""
    B, S, H, D = x_BSHD.shape
    return x_BSHD.reshape(B, world_size, S // world_size, H, D).permute(1, 0, 2, 3, 4).contiguous()


def unpack_heads(recv_PBSHD: Tensor) -> Tensor:
    """``[P, B, s, h, D] -> [B, s, P*h, D]``: the peers' heads in rank order."""
    P, B, S, H, D = recv_PBSHD.shape
    return _fresh_strides(recv_PBSHD.permute(1, 2, 0, 3, 4), (B, S, P * H, D))


def pack_chunks(x: Tensor, dim: int, world_size: int) -> Tensor:
    """``[..., N, ...] -> [P, ..., N/P, ...]``: `world_size` equal slices of `dim`, one for each peer."""
    return x.unflatten(dim, (world_size, x.size(dim) // world_size)).movedim(dim, 0).contiguous()


def unpack_chunks(recv: Tensor, dim: int) -> Tensor:
    """``[P, ..., n, ...] -> [..., P*n, ...]``: the peers' parts concatenated along `dim`. No copy for dim 0."""
    shape = list(recv.shape[1:])
    shape[dim] *= recv.size(0)
    return _fresh_strides(recv.movedim(0, dim), shape)


def _fresh_strides(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.contiguous().view(-1).view(shape)
