"""`copy_parts` in plain torch: the twin of the Triton kernel, for CPU and NPU, and the reference for its tests."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["check_pairs", "copy_parts"]


def copy_parts(sources: Sequence[Tensor], destinations: Sequence[Tensor]) -> None:
    """Copy each source into the destination beside it, one `Tensor.copy_` a pair.

    Raises:
        ValueError, TypeError: from `check_pairs`.
    """
    check_pairs(sources, destinations)
    for source, destination in zip(sources, destinations, strict=True):
        destination.copy_(source)


def check_pairs(sources: Sequence[Tensor], destinations: Sequence[Tensor]) -> None:
    """Refuse what a copy of bits between pairs of tensors cannot do.

    Raises:
        ValueError: for lists of different lengths, a pair of different shapes, tensors on several devices, a
            destination with elements that share memory, or a lazily conjugated or negated tensor.
        TypeError: for a pair of different dtypes.
    """
    if len(sources) != len(destinations):
        raise ValueError(f"copy_parts: {len(sources)} sources but {len(destinations)} destinations; they go in pairs")
    for i, (source, destination) in enumerate(zip(sources, destinations, strict=True)):
        if source.shape != destination.shape:
            raise ValueError(
                f"copy_parts: pair {i}: the source is {tuple(source.shape)}, "
                f"the destination {tuple(destination.shape)}; they must be equal"
            )
        if source.dtype != destination.dtype:
            raise TypeError(
                f"copy_parts: pair {i}: the source is {source.dtype}, the destination {destination.dtype}; "
                "bits are copied, so they must be equal"
            )
        if source.device != sources[0].device or destination.device != sources[0].device:
            raise ValueError(
                f"copy_parts: pair {i} is on {source.device} and {destination.device}, the first source on "
                f"{sources[0].device}; all must be on one device"
            )
        if any(x.is_conj() or x.is_neg() for x in (source, destination)):
            raise ValueError(
                f"copy_parts: pair {i} is lazily conjugated or negated, so its bits are not its values; "
                "call resolve_conj() and resolve_neg() first"
            )
        if any(stride == 0 and size > 1 for size, stride in zip(destination.shape, destination.stride(), strict=True)):
            raise ValueError(
                f"copy_parts: pair {i}: elements of the destination share memory (shape {tuple(destination.shape)}, "
                f"strides {destination.stride()})"
            )
