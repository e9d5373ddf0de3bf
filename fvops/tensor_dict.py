"""Dictionaries of tensors between ranks: a manifest as an object, then each tensor's memory on its own.

Tensors anywhere in the dictionary, at any depth of containers, travel beside the object, uncopied where they are
contiguous: those on the CPU over the CPU process group, those on the group's device over what carries its tensors. Only
values travel: what arrives has no gradient. A tensor met twice travels once, and arrives as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fvops import objects
from fvops.objects import Message, Wire
from fvops.serialization import check_size, decode
from fvops.wire_format import MOST_DIMS

__all__ = ["Manifest", "pack_dict", "receive", "wire_bytes"]


@dataclass
class Manifest:
    """What was announced: where each tensor lives ("cpu" or "device"), and the dictionary around them.

    Attributes:
        parts: into how many parts a tensor is cut whose numel divides, and which of them this message carries.
        tensors: (dtype, shape, where) of each tensor.
        body: the dictionary, encoded, referring to the tensors by number.
    """

    parts: tuple[int, int]
    tensors: list[tuple[torch.dtype, tuple[int, ...], str]]
    body: bytes


def pack_dict(
    tensor_dict: Any, device: torch.device, refusal: str, parts: tuple[int, int] = (1, 0)
) -> tuple[Message, list[Tensor]]:
    """The manifest of `tensor_dict` as a message, and its tensors; a failure is in the message.

    Args:
        device: the group's, beside the CPU the only one that tensors may be on.
        refusal: how a message begins: the op and the group.
    """
    tensors: list[Tensor] = []
    body = objects.pack(tensor_dict, tensors)
    if type(tensor_dict) is not dict:
        body = _failed(TypeError(f"{refusal}: needs a dictionary, got {type(tensor_dict).__name__}"))
    strangers = [tensor for tensor in tensors if tensor.device.type != "cpu" and tensor.device != device]
    if strangers and body.failure is None:
        body = _failed(
            ValueError(
                f"{refusal}: a tensor of shape {tuple(strangers[0].shape)} is on {strangers[0].device}; "
                f"tensors on the CPU or the group's device, {device}, can be sent"
            )
        )
    if body.failure is not None:
        return body, []
    listed = [(t.dtype, tuple(t.shape), "cpu" if t.device.type == "cpu" else "device") for t in tensors]
    message = objects.pack((parts, listed, bytes(body.data)))
    try:
        check_size(sum(tensor.numel() * tensor.element_size() for tensor in tensors), f"{refusal}: the tensors")
    except ValueError as error:
        return _failed(error), []
    return message, tensors


def wire_bytes(tensor: Tensor) -> Tensor:
    """The elements as flat bytes, in order: a view where `tensor` is contiguous."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8)


def receive(
    manifest: bytearray, device: torch.device, refusal: str, fetch: Callable[[Manifest, Tensor], None], wire: Wire
) -> Any:
    """The dictionary of which `manifest` tells.

    Args:
        device: the group's; tensors that were on the sender's arrive there.
        refusal: how a message begins: the op and the group.
        fetch: fills one tensor, contiguous, with what arrives for it.
        wire: tells whether all of them have come. With a manifest that is refused they have not, if there are any.

    Raises:
        ValueError: the manifest is none, or announces more bytes than ``FVOPS_MAX_OBJECT_MB`` allows.
        TypeError: a class in the dictionary was not allowed here.
    """
    tensors = []
    with wire.message():
        opened = _open(decode(manifest), refusal)
        nbytes = sum(math.prod(shape) * dtype.itemsize for dtype, shape, _ in opened.tensors)
        check_size(nbytes, f"{refusal}: the tensors announced")
        for dtype, shape, where in opened.tensors:
            tensor = torch.empty(shape, dtype=dtype, device="cpu" if where == "cpu" else device)
            # What has no elements is not sent.
            if tensor.numel():
                fetch(opened, tensor)
            tensors.append(tensor)
    # After the tensors: a class refused here leaves nothing of this message under way.
    received = decode(opened.body, tensors)
    if type(received) is not dict:
        raise ValueError(f"{refusal}: a {type(received).__name__} came where a dictionary was due")
    return received


def _open(announced: Any, refusal: str) -> Manifest:
    """The manifest in a decoded object; ValueError for any other object."""
    match announced:
        case ((int(n), int(k)), list(listed), bytes(body)) if 0 <= k < n and all(map(_is_entry, listed)):
            for _, shape, _ in listed:
                _check_shape(shape, refusal)
            return Manifest((n, k), listed, body)
    raise ValueError(f"{refusal}: what arrived is no manifest of a dictionary: {str(announced)[:100]}")


def _is_entry(entry: Any) -> bool:
    match entry:
        case (torch.dtype(), tuple(shape), "cpu" | "device"):
            return all(type(size) is int for size in shape)
    return False


def _check_shape(shape: tuple[int, ...], refusal: str) -> None:
    """ValueError for a shape that no tensor has."""
    wrong = ""
    if len(shape) > MOST_DIMS:
        wrong = f"{len(shape)} dims, at most {MOST_DIMS} are read"
    elif any(size < 0 for size in shape):
        wrong = "a size below 0"
    # Torch computes strides as if a size of 0 were 1, and offsets in bytes of at most 16 for each element.
    elif math.prod(max(size, 1) for size in shape) >= 2**59:
        wrong = "sizes whose product is 2**59 or more, without those of 0"
    if wrong:
        raise ValueError(f"{refusal}: a tensor was announced with {wrong}: {str(shape)[:100]}")


def _failed(error: Exception) -> Message:
    return Message(bytearray(f"{type(error).__name__}: {error}".encode()), error)
