"""Objects to bytes: the sending half of `wire_format`. It writes only what the reading half takes."""

from __future__ import annotations

import copyreg
import enum
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fvops.wire_format import MAGIC, MOST_DEPTH, MOST_INT_BYTES, TORCH_NAMES, Tag, full_name, is_allowed, refusal

__all__ = ["Writer"]

_COUNT = struct.Struct("<Q")
_FLOAT = struct.Struct("<d")
# Numpy's kinds without pointers in them: bool, integers, floats, complex, bytes, text, dates and time differences.
_ARRAY_KINDS = "biufcSUmM"


class Writer:
    """One frame.

    Args:
        beside: where tensors go that shall travel on their own (`fvops.tensor_dict`); None writes them into the frame.

    Attributes:
        data: the bytes so far.
    """

    def __init__(self, beside: list[Tensor] | None = None) -> None:
        self.data = bytearray(MAGIC)
        self._beside = beside
        self._places: dict[int, int] = {}
        self._depth = 0

    def write(self, obj: Any) -> None:
        """Append `obj`.

        Raises:
            TypeError: its type, or that of something in it, may not travel; names it and the call that allows it.
            RecursionError: more than `MOST_DEPTH` containers within each other, or one that contains itself.
        """
        write = _WRITERS.get(type(obj))
        if write is None:
            write = Writer._other
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise RecursionError(f"the object has more than {MOST_DEPTH} levels, or contains itself")
        write(self, obj)
        self._depth -= 1

    def _bytes(self, tag: bytes, content: bytes | bytearray | memoryview) -> None:
        self.data += tag
        self.data += _COUNT.pack(len(content))
        self.data += content

    def _int(self, number: int) -> None:
        size = number.bit_length() // 8 + 1
        if size > MOST_INT_BYTES:
            raise TypeError(f"an integer of {size} bytes cannot be sent between ranks; at most {MOST_INT_BYTES} can")
        self._bytes(Tag.INT, number.to_bytes(size, "little", signed=True))

    def _str(self, text: str) -> None:
        self._bytes(Tag.STR, text.encode("utf-8", "surrogatepass"))

    def _many(self, tag: bytes, items: Any) -> None:
        self.data += tag
        self.data += _COUNT.pack(len(items))
        for item in items:
            self.write(item)

    def _pairs(self, tag: bytes, mapping: dict[Any, Any]) -> None:
        self.data += tag
        self.data += _COUNT.pack(len(mapping))
        for key, value in mapping.items():
            self.write(key)
            self.write(value)

    def _tensor(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
            raise TypeError(
                f"only dense tensors with data travel between ranks, got one of layout {tensor.layout}, "
                f"dtype {tensor.dtype}, on {tensor.device}"
            )
        if self._beside is not None:
            # The same tensor twice travels once.
            place = self._places.setdefault(id(tensor), len(self._beside))
            if place == len(self._beside):
                self._beside.append(tensor)
            self.data += Tag.BESIDE + _COUNT.pack(place)
            return
        flags = tensor.requires_grad | 2 * isinstance(tensor, torch.nn.Parameter)
        self.data += Tag.TENSOR + bytes([flags])
        self._str(TORCH_NAMES[tensor.dtype])
        self._many(Tag.TUPLE, tuple(tensor.shape))
        resolved = tensor.detach().resolve_conj().resolve_neg().cpu()
        flat = resolved.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
        self._bytes(Tag.BYTES, flat.numpy().data)

    def _torch_value(self, value: Any) -> None:
        self._bytes(Tag.TORCH, TORCH_NAMES[value].encode())

    def _other(self, obj: Any) -> None:
        """What has no entry in the table: numpy, and classes of the program."""
        numpy = sys.modules.get("numpy")
        if numpy is not None and (type(obj) is numpy.ndarray or isinstance(obj, numpy.generic)):
            self._numpy(obj, Tag.ARRAY if type(obj) is numpy.ndarray else Tag.SCALAR)
        elif isinstance(obj, type) or (callable(obj) and is_allowed(obj)):
            self._global(obj)
        else:
            self._object(obj)

    def _numpy(self, obj: Any, tag: bytes) -> None:
        if obj.dtype.itemsize == 0:
            # An empty text's scalar; as an array it has room for one character.
            obj = obj.__array__()
        dtype = obj.dtype
        if dtype.kind not in _ARRAY_KINDS or dtype.hasobject or dtype.names is not None:
            raise TypeError(f"numpy arrays of dtype {dtype} do not travel between ranks; plain numbers and text do")
        self.data += tag
        self._str(dtype.str)
        self._many(Tag.TUPLE, obj.shape)
        self._bytes(Tag.BYTES, obj.tobytes())

    def _global(self, item: Any) -> None:
        if not is_allowed(item):
            raise TypeError(refusal(full_name(item)))
        self._bytes(Tag.GLOBAL, full_name(item).encode())

    def _object(self, obj: Any) -> None:
        """As `how` to build it (b"n": __new__, b"c": a call), the class or function, arguments, state, items."""
        reduced = _reduce(obj)
        function, args = reduced[0], reduced[1]
        state, items, pairs = (*reduced[2:5], None, None, None)[:3]
        named: dict[str, Any] = {}
        how = b"c"
        if function is getattr(copyreg, "__newobj__"):  # noqa: B009  (the name is not mangled this way)
            how, function, args = b"n", args[0], args[1:]
        elif function is getattr(copyreg, "__newobj_ex__"):  # noqa: B009
            how, (function, args, named) = b"n", args
        if not is_allowed(function):
            raise TypeError(refusal(full_name(function)))
        self.data += Tag.OBJECT + how
        self._str(full_name(function))
        self.write(tuple(args))
        self.write(dict(named))
        self.write(state)
        self.write(None if items is None else list(items))
        self.write(None if pairs is None else [list(pair) for pair in pairs])


def _reduce(obj: Any) -> tuple[Any, ...]:
    if isinstance(obj, enum.Enum):
        return type(obj), (obj.value,)
    if not is_allowed(type(obj)):
        raise TypeError(refusal(full_name(type(obj))))
    reduced = obj.__reduce_ex__(2)
    if not isinstance(reduced, tuple):
        raise TypeError(refusal(full_name(type(obj))))
    return reduced


_WRITERS: dict[type, Callable[[Writer, Any], None]] = {
    type(None): lambda writer, obj: writer.data.extend(Tag.NONE),
    bool: lambda writer, obj: writer.data.extend(Tag.TRUE if obj else Tag.FALSE),
    int: Writer._int,
    float: lambda writer, obj: writer.data.extend(Tag.FLOAT + _FLOAT.pack(obj)),
    complex: lambda writer, obj: writer.data.extend(Tag.COMPLEX + _FLOAT.pack(obj.real) + _FLOAT.pack(obj.imag)),
    str: Writer._str,
    bytes: lambda writer, obj: writer._bytes(Tag.BYTES, obj),
    bytearray: lambda writer, obj: writer._bytes(Tag.BYTEARRAY, obj),
    list: lambda writer, obj: writer._many(Tag.LIST, obj),
    tuple: lambda writer, obj: writer._many(Tag.TUPLE, obj),
    set: lambda writer, obj: writer._many(Tag.SET, obj),
    frozenset: lambda writer, obj: writer._many(Tag.FROZENSET, obj),
    dict: lambda writer, obj: writer._pairs(Tag.DICT, obj),
    OrderedDict: lambda writer, obj: writer._pairs(Tag.ORDERED, obj),
    Tensor: Writer._tensor,
    torch.nn.Parameter: Writer._tensor,
    torch.Size: lambda writer, obj: writer._many(Tag.SIZE, tuple(obj)),
    torch.device: lambda writer, obj: writer._bytes(Tag.DEVICE, str(obj).encode()),
    torch.dtype: Writer._torch_value,
    torch.layout: Writer._torch_value,
    torch.memory_format: Writer._torch_value,
}
