"""Python objects over a process group, as `serialization` encodes them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fvops.serialization import decode, encode

__all__ = ["broadcast"]


def broadcast(objects: list[Any], src: int, group: dist.ProcessGroup) -> list[Any]:
    """`objects` of global rank `src`, on every rank of `group` (gloo), in one message.

    Raises:
        TypeError: the sender cannot encode them; every rank raises, with the sender's reason (on the sender it is
            the exception itself).
    """
    sending = dist.get_rank() == src
    failure: Exception | None = None
    data = torch.empty(0, dtype=torch.uint8)
    if sending:
        try:
            data = encode(objects)
        except Exception as error:
            # Whatever an object's own code raises: the others are waiting, and get the reason in the object's place.
            failure, data = error, _text_to_bytes(f"{type(error).__name__}: {error}")
    header = torch.tensor([data.numel(), failure is not None])
    dist.broadcast(header, src=src, group=group)
    if not sending:
        data = torch.empty(int(header[0]), dtype=torch.uint8)
    dist.broadcast(data, src=src, group=group)
    if failure is not None:
        raise failure
    if sending:
        return objects
    if header[1]:
        raise TypeError(f"global rank {src} could not send its object: {data.numpy().tobytes().decode()}")
    return list(decode(data))


def _text_to_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
