"""What a communicator over a library refuses before it hands an address on: the library would read or write anyway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fvops import checks
from fvops.checks import where

__all__ = ["check_buffer", "check_pair", "check_rows"]


def check_buffer(op: str, group_name: str, what: str, tensor: Any, device: torch.device) -> None:
    """TypeError unless `tensor` is a Tensor; ValueError unless it is dense, on `device`, and in plain memory order."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where(op, group_name)}: {what} must be a tensor, got {type(tensor).__name__}")
    checks.check_strided(op, group_name, tensor)
    checks.check_device(op, group_name, tensor, device)
    if not tensor.is_contiguous():
        raise ValueError(
            f"{where(op, group_name)}: {what} of shape {tuple(tensor.shape)} has strides {tensor.stride()}; "
            "only contiguous memory can be handed to the library: use its contiguous() copy"
        )
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError(f"{where(op, group_name)}: {what} is a lazy conjugate or negative; resolve it first")


def check_pair(
    op: str, group_name: str, output: Tensor, input_: Tensor, *, output_parts: int = 1, input_parts: int = 1
) -> None:
    """TypeError for two dtypes; ValueError unless both hold equal parts.

    Args:
        output_parts, input_parts: how many ranks' parts each holds, e.g. all_gather: P and 1.
    """
    _check_dtypes(op, group_name, output, input_)
    if output.numel() * input_parts != input_.numel() * output_parts:
        raise ValueError(
            f"{where(op, group_name)}: the output has {output.numel()} elements and holds {output_parts} part(s), "
            f"the input {input_.numel()} and {input_parts}: the parts differ"
        )


def check_rows(
    op: str,
    group_name: str,
    output: Tensor,
    input_: Tensor,
    output_split_sizes: Sequence[int] | None,
    input_split_sizes: Sequence[int] | None,
    world_size: int,
) -> None:
    """Refuse an exchange of rows whose tensors do not fit the split sizes, or are the same memory."""
    checks.check_all_to_all_single(group_name, input_, output_split_sizes, input_split_sizes, world_size)
    _check_dtypes(op, group_name, output, input_)
    rows = input_.size(0) if output_split_sizes is None else sum(output_split_sizes)
    needed = (rows, *input_.shape[1:])
    if tuple(output.shape) != needed:
        raise ValueError(f"{where(op, group_name)}: the output has shape {tuple(output.shape)}, needs {needed}")
    if output.numel() and output.data_ptr() == input_.data_ptr():
        raise ValueError(f"{where(op, group_name)}: output and input are the same memory; it cannot be in place")


def _check_dtypes(op: str, group_name: str, output: Tensor, input_: Tensor) -> None:
    if output.dtype != input_.dtype:
        raise TypeError(f"{where(op, group_name)}: the output is {output.dtype}, the input {input_.dtype}")
