"""Small tensor helpers for sharding a sequence, which need no process group, and the group that needs only a store."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fvops.stateless_process_group import StatelessProcessGroup
from fvops.wire_format import add_safe_globals

__all__ = [
    "StatelessProcessGroup",
    "add_safe_globals",
    "compute_padding_for_sp",
    "divide",
    "ensure_divisibility",
    "pad_sequence_tensor",
    "split_tensor_along_last_dim",
    "unpad_sequence_tensor",
]


def ensure_divisibility(numerator: int, denominator: int) -> None:
    """Raise ValueError, naming both numbers, unless `numerator` is a multiple of `denominator`."""
    if denominator == 0 or numerator % denominator != 0:
        raise ValueError(f"{numerator} is not divisible by {denominator}")


def divide(numerator: int, denominator: int) -> int:
    """``numerator // denominator``, refused with ValueError when there is a remainder."""
    ensure_divisibility(numerator, denominator)
    return numerator // denominator


def split_tensor_along_last_dim(
    tensor: Tensor, num_partitions: int, contiguous_split_chunks: bool = False
) -> Sequence[Tensor]:
    """Split ``[..., N]`` into `num_partitions` tensors ``[..., N / num_partitions]``: views, or contiguous."""
    chunks = torch.split(tensor, divide(tensor.size(-1), num_partitions), dim=-1)
    if contiguous_split_chunks:
        return tuple(chunk.contiguous() for chunk in chunks)
    return chunks


def compute_padding_for_sp(seq_len: int, sp_world_size: int) -> tuple[int, int]:
    """The smallest multiple of `sp_world_size` that holds `seq_len`, and how much padding that takes.

    Returns:
        ``(padded_len, amount)`` in tokens.
    """
    if sp_world_size < 1:
        raise ValueError(f"sp_world_size must be at least 1, got {sp_world_size}")
    amount = -seq_len % sp_world_size
    return seq_len + amount, amount


def pad_sequence_tensor(tensor: Tensor, target_seq_len: int, seq_dim: int = 1, pad_value: float = 0.0) -> Tensor:
    """Extend dim `seq_dim` to `target_seq_len` with `pad_value` at its end; the tensor itself when it has that length.

    Raises:
        ValueError: the tensor is longer than `target_seq_len`.
    """
    dim = _dim(tensor, seq_dim)
    amount = target_seq_len - tensor.size(dim)
    if amount < 0:
        raise ValueError(f"cannot pad dim {seq_dim} of size {tensor.size(dim)} to the shorter length {target_seq_len}")
    if amount == 0:
        return tensor
    # F.pad counts dims from the last one, two numbers (before, after) for each.
    return F.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, amount], value=pad_value)


def unpad_sequence_tensor(tensor: Tensor, original_seq_len: int, seq_dim: int = 1) -> Tensor:
    """The first `original_seq_len` entries of dim `seq_dim`, as a view.

    Raises:
        ValueError: the tensor is shorter than `original_seq_len`.
    """
    dim = _dim(tensor, seq_dim)
    if original_seq_len < 0 or original_seq_len > tensor.size(dim):
        raise ValueError(f"cannot take {original_seq_len} entries of dim {seq_dim}, which has {tensor.size(dim)}")
    return tensor.narrow(dim, 0, original_seq_len)


def _dim(tensor: Tensor, dim: int) -> int:
    if not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(f"dim {dim} is out of range for a tensor of shape {tuple(tensor.shape)}")
    return dim % tensor.dim()
