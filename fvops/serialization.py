"""Objects as bytes, for whatever carries objects between ranks; nothing that arrives is trusted.

Plain containers and scalars, dense tensors, numpy arrays and scalars without objects in them, torch's dtypes, layouts,
sizes and devices travel; other classes only once `add_safe_globals` has allowed them. Tensors arrive on the CPU. An
object that is met twice arrives as two. The format is `fvops.wire_format`, what it guards against `docs/security.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fvops import envs
from fvops.wire_format import add_safe_globals
from fvops.wire_reader import Reader
from fvops.wire_writer import Writer

__all__ = ["add_safe_globals", "check_size", "decode", "encode"]


def encode(obj: Any, beside: list[Tensor] | None = None) -> bytearray:
    """`obj` as bytes.

    Args:
        beside: filled with the tensors in `obj`, which then travel on their own; None: they go into the bytes.

    Raises:
        TypeError: `decode` would refuse the bytes; the type and the call that allows it are named.
        ValueError: more bytes than ``FVOPS_MAX_OBJECT_MB`` allows.
        RecursionError: containers nested too deeply, or one that contains itself.
    """
    writer = Writer(beside)
    writer.write(obj)
    check_size(len(writer.data), "the object")
    return writer.data


def decode(data: bytes | bytearray | memoryview, beside: Sequence[Tensor] = ()) -> Any:
    """The object in `data` (from `encode`), with the tensors that came `beside` it.

    Raises:
        TypeError: it holds a class that was not allowed; the class and the call that allows it are named.
        ValueError: the bytes are damaged, too many, or no such object.
    """
    try:
        check_size(len(data), "the object")
        reader = Reader(data, beside)
        obj = reader.read()
        reader.end()
        return obj
    except Exception as error:
        # Allowed classes run their own code on what came, and may raise anything.
        kind = TypeError if isinstance(error, TypeError) else ValueError
        detail = str(error) if type(error) in (TypeError, ValueError) else f"{type(error).__name__}: {error}"
        raise kind(f"refused to decode an object from another rank: {detail}") from error


def check_size(nbytes: int, what: str) -> None:
    """ValueError unless `nbytes` is a size that ``FVOPS_MAX_OBJECT_MB`` allows; called before memory is taken."""
    limit = envs.FVOPS_MAX_OBJECT_MB << 20
    if not 0 <= nbytes <= limit:
        raise ValueError(
            f"{what} has {nbytes} bytes; between ranks at most {limit} are allowed (FVOPS_MAX_OBJECT_MB={limit >> 20})"
        )
