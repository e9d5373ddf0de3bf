"""For tests that run on the CPU and, where there is one, on a GPU: the mark, and tensors moved as they lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.draws import storage_bits

__all__ = ["GPU", "on_device", "on_gpu"]

# The marks of a test that needs an NVIDIA GPU. Nothing here or at import starts a CUDA context.
GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


def on_gpu(test: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a test so."""
    for mark in GPU:
        test = mark(test)
    return test


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device` with its strides, its offset and all the memory it is a view of; ``x.to`` would pack it."""
    memory = storage_bits(x).to(device)
    return torch.empty(0, dtype=x.dtype, device=device).set_(
        memory.untyped_storage(), x.storage_offset(), x.shape, x.stride()
    )
