"""The bytes that an object becomes between ranks: one tag, then what the tag says. `docs/security.md` has the table.

A format of our own, since a pickle is a program and even a restricted loader of it allocates what a header asks for.
Here nothing is named that is not in the tables below or allowed by `add_safe_globals`, and no length exceeds the bytes
that have arrived.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

__all__ = [
    "MAGIC",
    "MOST_DEPTH",
    "MOST_DIMS",
    "MOST_EQUAL_HASHES",
    "MOST_INT_BYTES",
    "TORCH_NAMES",
    "TORCH_VALUES",
    "Tag",
    "add_safe_globals",
    "allowed_global",
    "full_name",
    "is_allowed",
    "refusal",
]

MAGIC = b"fvo1"
# Containers within containers; Python's own stack bears more.
MOST_DEPTH = 128
# torch has 64, numpy 64 (32 before 2.0).
MOST_DIMS = 64
# An integer of this many bytes has 9,900 digits; its arithmetic and hash stay cheap.
MOST_INT_BYTES = 4096
# Keys of one set or dictionary with the same hash: each is compared with all before it. Comparing this many costs about
# what decoding them does; honest keys stay far below (the powers of two among the floats reach 34).
MOST_EQUAL_HASHES = 100


class Tag:
    """The first byte of each value."""

    NONE, TRUE, FALSE, INT, FLOAT, COMPLEX, STR, BYTES, BYTEARRAY = b"N", b"T", b"F", b"i", b"f", b"c", b"s", b"b", b"B"
    LIST, TUPLE, SET, FROZENSET, DICT, ORDERED = b"l", b"t", b"S", b"Z", b"d", b"O"
    # a tensor, one that travels beside the frame, a numpy array, a numpy scalar
    TENSOR, BESIDE, ARRAY, SCALAR = b"x", b"@", b"a", b"n"
    TORCH, SIZE, DEVICE = b"y", b"z", b"D"
    # a class that was allowed; an object of one
    GLOBAL, OBJECT = b"g", b"o"


# torch.float32, torch.strided, torch.channels_last and their like, by name.
TORCH_VALUES: dict[str, Any] = {
    str(value): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format)
}
TORCH_NAMES: dict[Any, str] = {value: name for name, value in TORCH_VALUES.items()}

_allowed: dict[str, Any] = {}
_lock = threading.Lock()


def add_safe_globals(classes: list[Any]) -> None:
    """Allow objects of `classes` to arrive from other ranks; each rank must allow them. Adds to what was allowed.

    Their constructors, ``__setstate__`` and ``__reduce__`` functions listed here are called with arguments that a
    peer chose.

    Raises:
        TypeError: an item has no module and name to be found by.
    """
    named = [(full_name(item), item) for item in classes]
    with _lock:
        for name, item in named:
            # A class that was defined anew (a re-run cell, a reloaded module) takes the place of the old one.
            _allowed[name] = item


def full_name(item: Any) -> str:
    """``module.qualname`` of a class or function; TypeError for what has none."""
    module, name = getattr(item, "__module__", None), getattr(item, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError(f"add_safe_globals takes classes and functions, got {item!r}")
    return f"{module}.{name}"


def is_allowed(item: Any) -> bool:
    """Is exactly this class or function allowed?"""
    name = f"{getattr(item, '__module__', None)}.{getattr(item, '__qualname__', None)}"
    return _allowed.get(name) is item


def allowed_global(name: str) -> Any:
    """The class or function that was allowed under `name`. Nothing is imported.

    Raises:
        TypeError: none was; the call that allows it is named.
    """
    if name not in _allowed:
        raise TypeError(refusal(name))
    return _allowed[name]


def refusal(name: str) -> str:
    """What is said of a type that may not travel."""
    return (
        f"objects of type {name[:200]!r} cannot be sent between ranks; if a peer may have the class built, "
        "call fvops.utils.add_safe_globals([TheClass]) on every rank first"
    )
