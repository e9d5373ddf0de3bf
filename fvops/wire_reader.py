"""Bytes to objects: the receiving half of `wire_format`. Every byte may have been chosen by an enemy.

No length is believed: it is compared with the bytes that are left before anything is made. An item of a container takes
at least one byte, so a frame of n bytes makes O(n) bytes of objects, with Python's overhead (at most about 200 bytes
for each byte, which a list of empty dictionaries comes near).
"""

from __future__ import annotations

import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fvops.wire_format import (
    MAGIC,
    MOST_DEPTH,
    MOST_DIMS,
    MOST_EQUAL_HASHES,
    MOST_INT_BYTES,
    TORCH_VALUES,
    Tag,
    allowed_global,
)

__all__ = ["Reader"]

_COUNT = struct.Struct("<Q")
_FLOAT = struct.Struct("<d")
_ARRAY_KINDS = "biufcSUmM"


class Reader:
    """One frame.

    Args:
        data: the frame.
        beside: the tensors that came beside it.

    Raises:
        ValueError: it does not begin as a frame does.
    """

    def __init__(self, data: bytes | bytearray | memoryview, beside: Sequence[Tensor] = ()) -> None:
        self._data = memoryview(data)
        self._beside = beside
        self._at = 0
        self._depth = 0
        if self._take(len(MAGIC)) != MAGIC:
            _refuse("it is not a frame of fvops (pickles are not read)")

    def read(self) -> Any:
        """The next value.

        Raises:
            ValueError: the bytes are no value, or end too early.
            TypeError: a class that was not allowed.
        """
        tag = bytes(self._take(1))
        read = _READERS.get(tag)
        if read is None:
            _refuse(f"unknown tag {tag!r}")
        self._depth += 1
        if self._depth > MOST_DEPTH + 1:
            _refuse(f"more than {MOST_DEPTH} levels")
        value = read(self)
        self._depth -= 1
        return value

    def end(self) -> None:
        """ValueError when bytes are left over."""
        if self._at != len(self._data):
            _refuse(f"{len(self._data) - self._at} bytes too many")

    def _take(self, count: int) -> memoryview:
        if count > len(self._data) - self._at:
            _refuse(f"{count} bytes announced, {len(self._data) - self._at} are left")
        part = self._data[self._at : self._at + count]
        self._at += count
        return part

    def _count(self) -> int:
        count: int = _COUNT.unpack(self._take(8))[0]
        if count > len(self._data) - self._at:
            _refuse(f"{count} bytes or items announced, {len(self._data) - self._at} bytes are left")
        return count

    def _bytes(self) -> memoryview:
        return self._take(self._count())

    def _typed(self, kind: type) -> Any:
        value = self.read()
        if type(value) is not kind:
            _refuse(f"a {kind.__name__} was due, a {type(value).__name__} came")
        return value

    def _int(self) -> int:
        content = self._bytes()
        if len(content) > MOST_INT_BYTES:
            _refuse(f"an integer of {len(content)} bytes; at most {MOST_INT_BYTES} are read")
        return int.from_bytes(content, "little", signed=True)

    def _float(self) -> float:
        value: float = _FLOAT.unpack(self._take(8))[0]
        return value

    def _str(self) -> str:
        return str(self._bytes(), "utf-8", "surrogatepass")

    def _list(self) -> list[Any]:
        return [self.read() for _ in range(self._count())]

    def _dict(self) -> dict[Any, Any]:
        # Keys come before their values: a tuple reads in that order.
        pairs = [(self.read(), self.read()) for _ in range(self._count())]
        _check_hashes(len(pairs), (key for key, _ in pairs))
        return dict(pairs)

    def _keys(self) -> list[Any]:
        """What is about to be a set."""
        keys = self._list()
        _check_hashes(len(keys), keys)
        return keys

    def _shape(self) -> tuple[int, ...]:
        shape = self._typed(tuple)
        if len(shape) > MOST_DIMS or not all(type(size) is int and 0 <= size < 2**62 for size in shape):
            _refuse(f"no shape: {str(shape)[:100]}")
        return shape

    def _tensor(self) -> Tensor:
        flags = self._take(1)[0]
        dtype = TORCH_VALUES.get(self._typed(str))
        if not isinstance(dtype, torch.dtype) or flags > 3:
            _refuse("a tensor without a dtype")
        shape, content = self._shape(), self._typed(bytes)
        if math.prod(shape) * dtype.itemsize != len(content):
            _refuse(f"{len(content)} bytes for a tensor of shape {shape} {dtype}")
        # A copy, since a tensor's memory must be aligned, and writable.
        flat = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
        tensor = flat.view(dtype).reshape(shape)
        if flags & 2:
            return torch.nn.Parameter(tensor, requires_grad=bool(flags & 1))
        return tensor.requires_grad_(bool(flags & 1))

    def _next_beside(self) -> Tensor:
        place: int = _COUNT.unpack(self._take(8))[0]
        if place >= len(self._beside):
            _refuse(f"tensor {place} of {len(self._beside)}")
        return self._beside[place]

    def _numpy(self) -> Any:
        import numpy

        text, shape, content = self._typed(str), self._shape(), self._typed(bytes)
        # Byte order, kind, size, and a date's unit; before numpy parses it, which knows a whole language.
        if len(text) > 20 or text[:1] not in "<>|=" or text[1:2] not in _ARRAY_KINDS or "," in text:
            _refuse(f"numpy dtype {text[:20]!r}")
        dtype = numpy.dtype(text)
        if dtype.itemsize == 0:
            # Any shape of it has no bytes, and numpy gives each item one.
            _refuse(f"numpy dtype {text[:20]!r} without a size")
        if dtype.hasobject or dtype.kind not in _ARRAY_KINDS or math.prod(shape) * dtype.itemsize != len(content):
            _refuse(f"{len(content)} bytes for a numpy array of shape {shape} {dtype}")
        if not content:
            return numpy.empty(shape, dtype)
        return numpy.frombuffer(bytearray(content), dtype).reshape(shape)

    def _torch_value(self) -> Any:
        name = str(self._bytes(), "ascii")
        if name not in TORCH_VALUES:
            _refuse(f"no dtype, layout or memory format: {name[:50]!r}")
        return TORCH_VALUES[name]

    def _object(self) -> Any:
        how, name = bytes(self._take(1)), self._typed(str)
        function = allowed_global(name)
        args, named = self._typed(tuple), self._typed(dict)
        state, items, pairs = self.read(), self.read(), self.read()
        if how == b"n" and isinstance(function, type):
            obj = function.__new__(function, *args, **named)
        elif how == b"c":
            obj = function(*args, **named)
        else:
            _refuse(f"cannot build a {name[:100]}")
        if state is not None:
            _set_state(obj, state)
        for item in items or []:
            obj.append(item)
        pairs = [(key, value) for key, value in pairs or []]
        _check_hashes(len(pairs), (key for key, _ in pairs))
        for key, value in pairs:
            obj[key] = value
        return obj


def _set_state(obj: Any, state: Any) -> None:
    if hasattr(obj, "__setstate__"):
        obj.__setstate__(state)
        return
    slots: dict[str, Any] = {}
    if isinstance(state, tuple) and len(state) == 2:
        state, slots = state[0] or {}, state[1] or {}
    vars_of = obj.__dict__ if state else {}
    vars_of.update(state)
    for name, value in slots.items():
        setattr(obj, name, value)


def _check_hashes(count: int, keys: Iterable[Any]) -> None:
    """ValueError when so many of the `count` keys have one hash that a table of them takes their square in time.

    The hashes of numbers are known to everybody: all multiples of 2**61 - 1 have the same.
    """
    if count <= MOST_EQUAL_HASHES:
        return
    most = max(Counter(map(hash, keys)).values())
    if most > MOST_EQUAL_HASHES:
        _refuse(f"{most} keys of a set or dictionary have the same hash; at most {MOST_EQUAL_HASHES} are read")


def _refuse(reason: str) -> NoReturn:
    raise ValueError(reason)


_READERS: dict[bytes, Callable[[Reader], Any]] = {
    Tag.NONE: lambda reader: None,
    Tag.TRUE: lambda reader: True,
    Tag.FALSE: lambda reader: False,
    Tag.INT: Reader._int,
    Tag.FLOAT: Reader._float,
    Tag.COMPLEX: lambda reader: complex(reader._float(), reader._float()),
    Tag.STR: Reader._str,
    Tag.BYTES: lambda reader: bytes(reader._bytes()),
    Tag.BYTEARRAY: lambda reader: bytearray(reader._bytes()),
    Tag.LIST: Reader._list,
    Tag.TUPLE: lambda reader: tuple(reader._list()),
    Tag.SET: lambda reader: set(reader._keys()),
    Tag.FROZENSET: lambda reader: frozenset(reader._keys()),
    Tag.DICT: Reader._dict,
    Tag.ORDERED: lambda reader: OrderedDict(reader._dict()),
    Tag.TENSOR: Reader._tensor,
    Tag.BESIDE: Reader._next_beside,
    Tag.ARRAY: Reader._numpy,
    Tag.SCALAR: lambda reader: reader._numpy()[()],
    Tag.TORCH: Reader._torch_value,
    Tag.SIZE: lambda reader: torch.Size(reader._list()),
    Tag.DEVICE: lambda reader: torch.device(str(reader._bytes(), "ascii")),
    Tag.GLOBAL: lambda reader: allowed_global(str(reader._bytes(), "utf-8")),
    Tag.OBJECT: Reader._object,
}
