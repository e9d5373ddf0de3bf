"""Python objects over a process group, as `serialization` encodes them: a header, then the bytes.

What cannot be encoded is told to the receivers, in the object's place: they are on their way to wait for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fvops.device_communicators.pending_sends import PendingSends
from fvops.serialization import check_size, decode, encode

__all__ = ["Message", "Wire", "broadcast", "broadcast_message", "pack", "recv_message", "send_message"]

# Apart from the tensors that `send` may have under way over the same process group.
TAG = 1
# How much of a failure's text is told.
_MOST_TEXT = 2000


@dataclass
class Message:
    """An encoded object, or why there is none.

    Attributes:
        data: its bytes, or the failure's text.
        failure: the exception that encoding raised, on the sender.
    """

    data: bytearray
    failure: Exception | None = None

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The header ``[bytes, failed]`` and the bytes."""
        data = torch.empty(0, dtype=torch.uint8) if not self.data else torch.frombuffer(self.data, dtype=torch.uint8)
        return torch.tensor([data.numel(), self.failure is not None]), data


class Wire:
    """How much of one call's message has passed: what fails in its middle leaves the rest under way to somebody's next.

    Attributes:
        began: some of it may have been sent or received.
        cut: but not all of it.
    """

    began = cut = False

    @contextlib.contextmanager
    def message(self) -> Iterator[None]:
        """All that passes of a message, or of what follows it, passes inside."""
        self.began = self.cut = True
        yield
        self.cut = False


def pack(obj: Any, beside: list[Tensor] | None = None) -> Message:
    """`obj` encoded (see `encode`); never raises, the failure is in the message."""
    try:
        return Message(encode(obj, beside))
    except Exception as error:
        # Whatever an object's own code raises: the others are waiting, and get the reason in the object's place.
        return Message(bytearray(f"{type(error).__name__}: {error}"[:_MOST_TEXT].encode()), error)


def broadcast(objects: list[Any], src: int, group: dist.ProcessGroup, wire: Wire) -> list[Any]:
    """`objects` of global rank `src`, on every rank of `group` (gloo), in one message; `wire` tells how far it came.

    Raises:
        TypeError: the sender cannot encode them; every rank raises, with the sender's reason (on the sender it is
            the exception itself). Or this rank has not allowed a class in them.
        ValueError: what came is damaged, or too large.
    """
    if dist.get_rank() == src:
        broadcast_message(pack(objects), src, group, wire)
        return objects
    received = decode(broadcast_message(None, src, group, wire))
    if type(received) is not list:
        raise ValueError(f"global rank {src} sent a {type(received).__name__} where a list of objects was due")
    return received


def broadcast_message(message: Message | None, src: int, group: dist.ProcessGroup, wire: Wire) -> bytearray:
    """The bytes of global rank `src`, on every rank; raises the message's failure there, and TypeError elsewhere."""
    if message is not None:
        header, data = message.tensors()
        with wire.message():
            dist.broadcast(header, src=src, group=group)
            dist.broadcast(data, src=src, group=group)
        if message.failure is not None:
            raise message.failure
        return message.data
    header = torch.zeros(2, dtype=torch.int64)
    with wire.message():
        dist.broadcast(header, src=src, group=group)
        received, data = _room(header, src)
        dist.broadcast(data, src=src, group=group)
    return _opened(received, header, src)


def send_message(message: Message, dst: int, group: dist.ProcessGroup, sends: PendingSends, wire: Wire) -> None:
    """Send to global rank `dst`, without waiting for it; then raise the message's failure, if it has one."""
    with wire.message():
        sends.raise_failure()
        for part in message.tensors():
            if part.numel():
                work: Any = dist.isend(part, dst=dst, group=group, tag=TAG)
                sends.add(work.wait, part)
    if message.failure is not None:
        raise message.failure


def recv_message(src: int, group: dist.ProcessGroup, wire: Wire) -> bytearray:
    """The bytes that global rank `src` sends; TypeError when it could not encode its object."""
    header = torch.zeros(2, dtype=torch.int64)
    with wire.message():
        dist.recv(header, src=src, group=group, tag=TAG)
        received, data = _room(header, src)
        if data.numel():
            dist.recv(data, src=src, group=group, tag=TAG)
    return _opened(received, header, src)


def _room(header: Tensor, src: int) -> tuple[bytearray, Tensor]:
    """Memory for the bytes that `header` announces, as bytes and as a tensor; ValueError when they are too many."""
    check_size(int(header[0]), f"the object announced by global rank {src}")
    received = bytearray(int(header[0]))
    return received, torch.frombuffer(received, dtype=torch.uint8) if received else torch.empty(0, dtype=torch.uint8)


def _opened(received: bytearray, header: Tensor, src: int) -> bytearray:
    if header[1]:
        text = received.decode(errors="replace")[:_MOST_TEXT]
        raise TypeError(f"global rank {src} could not send its object: {text}")
    return received
