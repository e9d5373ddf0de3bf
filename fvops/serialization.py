"""Objects as bytes, for `broadcast_object` and its relatives; nothing that arrives is trusted.

Encoding is ``torch.save``; decoding is ``torch.load(weights_only=True)``, which builds plain containers, scalars,
tensors and torch's own value types, and runs no code that the bytes name. Classes beyond those are allowed one by one
with `add_safe_globals`.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor

__all__ = ["add_safe_globals", "decode", "encode"]

_allowed: list[Any] = []


def add_safe_globals(classes: list[Any]) -> None:
    """Allow objects of `classes` to arrive from other ranks; each rank must allow them. Adds to what was allowed."""
    _allowed.extend(item for item in classes if item not in _allowed)


def encode(obj: Any) -> Tensor:
    """`obj` as a flat uint8 tensor.

    Raises:
        TypeError: `decode` would refuse the bytes; the type and the call that allows it are named.
    """
    buffer = io.BytesIO()
    try:
        torch.save(obj, buffer)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(f"an object of type {type(obj).__qualname__} cannot be sent to other ranks: {error}") from error
    data = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    decode(data)
    return data


def decode(data: Tensor) -> Any:
    """The object in `data` (from `encode`).

    Raises:
        TypeError: it holds a class that was not allowed.
    """
    try:
        with torch.serialization.safe_globals(list(_allowed)):
            return torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("Check the documentation")[0].strip()
        raise TypeError(
            "refused to decode an object from another rank: it is not made of plain containers, scalars and tensors. "
            f"If its class is safe, call fvops.utils.add_safe_globals([TheClass]) on every rank first. ({reason})"
        ) from None
