"""A program of the user's own, named on a command line: ``module:function``, its inputs, the passes it gets."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["callable_of", "inputs_of", "named", "passes_of"]

_SWITCHES = ("layout", "merge", "cancel", "overlap", "dead", "absorb")
_LIMITS = ("merge", "overlap")


def named(name: str) -> Any:
    """What ``module:attribute`` or ``file.py:attribute`` names; modules in the working directory are found too.

    Raises:
        ValueError: there is no such module, file or attribute, or no colon.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise ValueError(f"{name!r} must be module:function or file.py:function")
    found: Any = _file(Path(place)) if place.endswith(".py") else _module(place)
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise ValueError(f"{name!r}: there is no {part!r} in {getattr(found, '__name__', place)}") from error
    return found


def _module(name: str) -> ModuleType:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # The module's own imports are its own affair.
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise
        raise ValueError(f"there is no module {name!r}, neither installed nor in {folder}") from error


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def callable_of(name: str) -> Callable[..., Any]:
    """The function or module to report. A class of modules is built without arguments; call it on the meta device.

    Raises:
        ValueError: as `named`, or it cannot be called.
    """
    found = named(name)
    if isinstance(found, type) and issubclass(found, nn.Module):
        found = found()
    if not callable(found):
        raise ValueError(f"{name!r} is a {type(found).__name__}, which cannot be called")
    return found


def inputs_of(specs: Sequence[str], function: str | None, backward: bool) -> tuple[Any, ...]:
    """The arguments: a meta tensor for each of `specs` (``1x4096x1536:bfloat16``), or what `function` returns.

    Args:
        backward: floating-point tensors made from `specs` require a gradient.

    Raises:
        ValueError: a spec cannot be read, or `function` gives neither a tuple nor a list.
    """
    if function is None:
        return tuple(_tensor(spec, backward) for spec in specs)
    found = named(function)()
    if not isinstance(found, (tuple, list)):
        raise ValueError(f"{function!r} must return a tuple or list of arguments, got a {type(found).__name__}")
    return tuple(found)


def _tensor(spec: str, backward: bool) -> Tensor:
    sizes, _, name = spec.partition(":")
    dtype = getattr(torch, name or "float32", None)
    try:
        shape = [int(size) for size in sizes.split("x")] if sizes else []
    except ValueError:
        shape = [-1]
    if not isinstance(dtype, torch.dtype) or min(shape, default=0) < 0:
        raise ValueError(f"input {spec!r} must be sizes and perhaps a dtype, as 1x4096x1536:bfloat16")
    if math.prod(shape) > 2**62:
        raise ValueError(f"input {spec!r} has too many elements")
    differentiable = dtype.is_floating_point or dtype.is_complex
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=backward and differentiable)


def passes_of(text: str) -> list[dict[str, Any]]:
    """What `fvops.compiler.enable` is to be called with, one after another, for ``all``, ``merge,overlap=1000`` etc.

    Raises:
        ValueError: an unknown pass, or a value that is none.
    """
    named_ones: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = item.partition("=")
        if item == "all":
            calls.append({})
        elif name not in _SWITCHES or ((name == "layout") != bool(equals) and name not in _LIMITS):
            raise ValueError(
                f"--passes: {item!r} is none of all, layout=auto|fused|exchange, merge[=BYTES], cancel, "
                "overlap[=BYTES], dead, absorb"
            )
        elif name == "layout":
            named_ones[name] = value
        elif equals and not value.isdecimal():
            raise ValueError(f"--passes: {item!r}: the limit must be a number of bytes")
        else:
            named_ones[name] = int(value) if equals else True
    return [*calls, named_ones] if named_ones else calls
