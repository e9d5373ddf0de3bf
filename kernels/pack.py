"""Packing for an exchange and unpacking after it: what communicators call, on any device.

`layout` gives rank-major views; here they become contiguous buffers and back. What lies in memory order already is
neither copied nor launched for; the rest is one `copy_parts`: the Triton kernel on CUDA, torch elsewhere.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fvops.kernels import parts_torch
from fvops.logger import init_logger

__all__ = ["Backend", "pack", "unpack"]

Backend = Literal["triton", "torch"]

_logger = init_logger(__name__)


def pack(parts: Sequence[Tensor], backend: Backend | None = None) -> list[Tensor]:
    """Contiguous send buffers that hold what the rank-major views `parts` show, in their order.

    A view that is contiguous is returned itself; it must not be written to.

    Args:
        parts: ``[P, ...]`` each, on one device; shapes and dtypes may differ.
        backend: who copies; default: triton on CUDA where it is installed, else torch. Triton on CPU tensors needs
            its interpreter (``TRITON_INTERPRET=1``).

    Raises:
        ValueError: for an unknown backend or parts on several devices.
    """
    if _is_torch(parts, backend):
        # The whole of it, in as few steps as can be: small exchanges feel each.
        return [_resolved(part).contiguous() for part in parts]
    sends = [_resolved(part) for part in parts]
    waiting = [i for i, part in enumerate(sends) if not part.is_contiguous()]
    views = [sends[i] for i in waiting]
    for i in waiting:
        sends[i] = torch.empty(parts[i].shape, dtype=parts[i].dtype, device=parts[i].device)
    _copy(views, [sends[i] for i in waiting], backend)
    return sends


def unpack(received: Sequence[Tensor], parts: Sequence[Tensor], backend: Backend | None = None) -> None:
    """Lay each received buffer down through the rank-major view of its output; nothing where it is that view.

    Args:
        received: contiguous buffers, from `layout.receive_buffer`.
        parts: the views, of the same shapes and dtypes.
        backend: as for `pack`.

    Raises:
        ValueError, TypeError: when the lists do not pair up (see `parts_torch.check_pairs`), or for an unknown backend.
    """
    if len(received) != len(parts):
        raise ValueError(f"unpack: {len(received)} received buffers but {len(parts)} parts; they go in pairs")
    if _is_torch(parts, backend):
        for buffer, view in zip(received, parts, strict=True):
            if buffer is not view:
                view.copy_(buffer)
        return
    pairs = [(buffer, view) for buffer, view in zip(received, parts, strict=True) if buffer is not view]
    _copy([buffer for buffer, _ in pairs], [view for _, view in pairs], backend)


def _is_torch(parts: Sequence[Tensor], backend: Backend | None) -> bool:
    """Does torch copy, without being asked to by name? Then the twin's checks find nothing: `pack` made the pairs."""
    return backend is None and (len(parts) == 0 or not parts[0].is_cuda or not _has_triton())


def _resolved(part: Tensor) -> Tensor:
    return part.resolve_conj().resolve_neg() if part.is_conj() or part.is_neg() else part


def _copy(sources: Sequence[Tensor], destinations: Sequence[Tensor], backend: Backend | None) -> None:
    if backend not in (None, "triton", "torch"):
        raise ValueError(f"fvops.kernels: unknown backend {backend!r}; use 'triton', 'torch' or None for the default")
    if not sources:
        return
    if backend == "torch":
        parts_torch.copy_parts(sources, destinations)
        return
    # Here, since the package must import without triton.
    from fvops.kernels import parts_copy

    parts_copy.copy_parts(sources, destinations)


@functools.cache
def _has_triton() -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found:
        _logger.info_once("triton is not installed: exchanges are packed by torch, one copy a tensor")
    return found
