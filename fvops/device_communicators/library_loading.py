"""Where a communication library is found, and what every binding of one shares: symbols, calls, errors.

The order is: the path that the caller gives, the one in an environment variable, the library that this process has
loaded already (torch's: two copies of one library in a process would not share their state), the vendor's wheel, and
last whatever the system's loader finds. A path that was asked for and cannot be loaded is an error, never a reason to
look further.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fvops import envs

__all__ = ["CommunicationLibrary", "LibraryError", "LibraryNotFoundError", "loaded_library"]

_MAPS = "/proc/self/maps"


class LibraryNotFoundError(RuntimeError):
    """The library is not there, cannot be loaded, or lacks a function that is needed."""


class LibraryError(RuntimeError):
    """A library function returned an error.

    Attributes:
        function: its C name.
        code: what it returned.
    """

    def __init__(self, function: str, code: int, text: str) -> None:
        super().__init__(f"{function} failed with code {code}: {text}")
        self.function = function
        self.code = code


class CommunicationLibrary:
    """A loaded library and its functions, all of which return 0 or an error code.

    Args:
        so_file: path of the library; default: see the module.

    Raises:
        LibraryNotFoundError: nothing could be loaded, or a needed function is missing.
    """

    VARIABLE: ClassVar[str]
    SONAME: ClassVar[str]  # how the loader calls it
    WHEEL: ClassVar[tuple[str, ...]]  # its place below the site-packages folder; empty: there is no wheel
    FUNCTIONS: ClassVar[Mapping[str, Sequence[Any]]]
    OPTIONAL: ClassVar[Mapping[str, Sequence[Any]]]
    TEXTS: ClassVar[Mapping[str, Sequence[Any]]]  # functions that return a string

    def __init__(self, so_file: str | None = None) -> None:
        self.path = so_file or getattr(envs, self.VARIABLE) or self._find()
        try:
            self._library = ctypes.CDLL(self.path)
        except OSError as error:
            raise LibraryNotFoundError(f"cannot load {self.path}: {error}") from None
        self._functions: dict[str, Any] = {}
        for name, arguments in {**self.FUNCTIONS, **self.OPTIONAL, **self.TEXTS}.items():
            function = getattr(self._library, name, None)
            if function is None:
                if name in self.OPTIONAL:
                    continue
                raise LibraryNotFoundError(f"{self.path} has no function {name}; is it too old?")
            function.argtypes = list(arguments)
            function.restype = ctypes.c_char_p if name in self.TEXTS else ctypes.c_int
            self._functions[name] = function

    def has(self, function: str) -> bool:
        """Does this version of the library have the optional `function`?"""
        return function in self._functions

    def _call(self, function: str, *args: Any) -> None:
        code = self._functions[function](*args)
        if code:
            raise LibraryError(function, code, self.describe(code))

    def describe(self, code: int) -> str:
        """What a result means, with whatever more the library has to say about it."""
        raise NotImplementedError

    def _text(self, function: str, *args: Any) -> str:
        text = self._functions[function](*args)
        return text.decode(errors="replace") if text else ""

    def _find(self) -> str:
        return loaded_library(self.SONAME) or _in_wheel(self.WHEEL) or self.SONAME


def loaded_library(soname: str) -> str | None:
    """The path under which this process has mapped a library of that name, whatever its version suffix."""
    if not os.path.exists(_MAPS):
        return None
    stem = soname.split(".so")[0] + ".so"
    with open(_MAPS) as maps:
        for line in maps:
            fields = line.split(maxsplit=5)
            if len(fields) == 6:
                path = fields[5].strip()
                if os.path.basename(path).startswith(stem) and os.path.exists(path):
                    return path
    return None


def _in_wheel(place: Sequence[str]) -> str | None:
    if not place:
        return None
    spec = importlib.util.find_spec(place[0])
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        path = os.path.join(folder, *place[1:])
        if os.path.exists(path):
            return path
    return None
