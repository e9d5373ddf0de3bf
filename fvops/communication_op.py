"""Collectives over the current tensor- and sequence-parallel groups, as model code calls them."""

from __future__ import annotations

import torch
from torch import Tensor

from fvops.checks import check_dim
from fvops.parallel_state import get_sp_group, get_tp_group
from fvops.utils import compute_padding_for_sp, pad_sequence_tensor, unpad_sequence_tensor

__all__ = [
    "sequence_model_parallel_all_gather",
    "sequence_model_parallel_all_gather_with_unpad",
    "sequence_model_parallel_all_to_all_4D",
    "sequence_model_parallel_shard",
    "tensor_model_parallel_all_gather",
    "tensor_model_parallel_all_reduce",
    "warmup_sequence_parallel_communication",
]


def tensor_model_parallel_all_reduce(input_: Tensor) -> Tensor:
    """The sum of the TP ranks' tensors, as a new tensor."""
    return get_tp_group().all_reduce(input_)


def tensor_model_parallel_all_gather(input_: Tensor, dim: int = -1) -> Tensor:
    """The TP ranks' tensors concatenated along `dim`."""
    return get_tp_group().all_gather(input_, dim)


def sequence_model_parallel_all_to_all_4D(input_: Tensor, scatter_dim: int = 2, gather_dim: int = 1) -> Tensor:
    """The Ulysses exchange. (2, 1): ``[B, S/P, H, D] -> [B, S, H/P, D]``; (1, 2): the inverse."""
    return get_sp_group().all_to_all_4D(input_, scatter_dim, gather_dim)


def sequence_model_parallel_all_gather(input_: Tensor, dim: int = -1) -> Tensor:
    """The SP ranks' tensors concatenated along `dim`."""
    return get_sp_group().all_gather(input_, dim)


def sequence_model_parallel_shard(input_: Tensor, dim: int = 1) -> tuple[Tensor, int]:
    """This rank's slice of `dim`, after padding it with zeros to a multiple of P; the gradient is scaled by 1/P.

    Returns:
        The slice ``[..., ceil(S/P), ...]`` and the length S before padding, in entries of `dim`.
    """
    group = get_sp_group()
    dim = check_dim("shard", group.unique_name, input_, dim)
    original_len = input_.size(dim)
    padded_len, amount = compute_padding_for_sp(original_len, group.world_size)
    if amount:
        input_ = pad_sequence_tensor(input_, padded_len, dim)
    return group.shard(input_, dim, scale_grad=True), original_len


def sequence_model_parallel_all_gather_with_unpad(input_: Tensor, original_seq_len: int, dim: int = -1) -> Tensor:
    """The SP ranks' tensors concatenated along `dim`, cut to `original_seq_len`: the inverse of `..._shard`."""
    return unpad_sequence_tensor(sequence_model_parallel_all_gather(input_, dim), original_seq_len, dim)


def warmup_sequence_parallel_communication(device: torch.device | None = None) -> None:
    """Run each collective once on a small tensor, so that connections are made before the first step.

    A group that will be captured wants `GroupCoordinator.warmup` with its real shapes instead.

    Raises:
        ValueError: `device` is not of the kind that the group works on.
    """
    group = get_sp_group()
    if device is not None and torch.device(device).type != group.device.type:
        raise ValueError(f"device={device}, but group {group.unique_name!r} works on {group.device}")
    if group.world_size > 1:
        group.warmup([], torch.float32)
