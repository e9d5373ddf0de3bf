"""FastVideo's own files, from an unpacked wheel, on a machine that lacks much of what FastVideo depends on.

``FASTVIDEO_DIR`` names the folder that holds ``fastvideo/``. What FastVideo imports and nobody has installed here
(torchvision, for one, is imported by its `utils` for a picture grid) is stood in for by a module whose names can be
imported but not used: FastVideo's files stay as they are, and a layer that needs the real package says so.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["ABSENT", "FOLDER", "import_module", "users_of_distributed"]

FOLDER = os.environ.get("FASTVIDEO_DIR")
# The packages that were stood in for, so far.
ABSENT: set[str] = set()


class _StandIn(ModuleType):
    """A package that is not installed: any name can be imported from it, and raises when it is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_: Any, **__: Any) -> None:
            raise ModuleNotFoundError(f"{self.__name__}.{name} is used, but {self.__name__} is not installed here")

        return type(name, (), {"__new__": refuse, "__module__": self.__name__})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in ABSENT:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def import_module(name: str) -> ModuleType:
    """FastVideo's module `name`; what it imports and is not installed is stood in for, and noted in `ABSENT`."""
    if FOLDER is not None and FOLDER not in sys.path:
        # Last: the wheel brings a folder `tests` too.
        sys.path.append(FOLDER)
    # Before anything is stood in for: transformers looks at what is installed, and would take a stand-in for real.
    importlib.import_module("diffusers.loaders.lora_base")
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
    while True:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            top = (error.name or "").partition(".")[0]
            if top in ABSENT or top in ("", "fastvideo") or importlib.util.find_spec(top) is not None:
                raise
            ABSENT.add(top)


def users_of_distributed() -> list[str]:
    """FastVideo's modules that import from ``fastvideo.distributed``, but for those inside it and its tests."""
    root = Path(FOLDER or "", "fastvideo")
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        if {"distributed", "tests"} & set(parts[1:2]) or "fastvideo.distributed" not in path.read_text():
            continue
        found.append(".".join(parts).removesuffix(".__init__"))
    return found
