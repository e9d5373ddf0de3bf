"""FastVideo on fvops, its files untouched: ``fastvideo.distributed`` and its submodules resolve to fvops."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from fvops.logger import init_logger

__all__ = ["install", "uninstall"]

logger = init_logger(__name__)

_PACKAGE = "fastvideo.distributed"
_DEVICE = "device_communicators"
_TARGETS = {
    _PACKAGE: "fvops",
    **{f"{_PACKAGE}.{name}": f"fvops.{name}" for name in ("communication_op", "parallel_state", "utils", _DEVICE)},
    **{
        f"{_PACKAGE}.{_DEVICE}.{name}": f"fvops.{_DEVICE}.{name}"
        for name in (
            "base_device_communicator",
            "cpu_communicator",
            "cuda_communicator",
            "npu_communicator",
            "pyhccl",
            "pyhccl_wrapper",
            "pynccl",
            "pynccl_wrapper",
        )
    },
}


class _Alias(ModuleType):
    """A module under FastVideo's name whose attributes are those of fvops' module of the same purpose."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__dict__["fvops_target"] = _TARGETS[name]

    def __getattr__(self, name: str) -> Any:
        target = importlib.import_module(self.__dict__["fvops_target"])
        try:
            return getattr(target, name)
        except AttributeError:
            raise AttributeError(f"{self.__name__} is {target.__name__} here, which has no {name!r}") from None

    def __dir__(self) -> list[str]:
        return dir(importlib.import_module(self.__dict__["fvops_target"]))


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _TARGETS:
            return None
        package = any(name.startswith(f"{fullname}.") for name in _TARGETS)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=package)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Alias(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run: the attributes are fvops'."""


class _Installation:
    """What was there before, to be put back."""

    def __init__(self) -> None:
        self.finder = _Finder()
        self.modules = {
            name: sys.modules.pop(name) for name in list(sys.modules) if f"{name}.".startswith(f"{_PACKAGE}.")
        }
        # (module, attribute, FastVideo's object, ours)
        self.bindings: list[tuple[ModuleType, str, Any, Any]] = []


_installation: _Installation | None = None


def install() -> None:
    """Have ``import fastvideo.distributed``, now and later, give fvops. Harmless when repeated.

    May be called before FastVideo is imported or after: names that its modules have taken from
    ``fastvideo.distributed`` already are replaced in them; one that fvops lacks stays FastVideo's, with a warning.
    FastVideo's fused all-to-all (``ulysses_a2a``) has no counterpart: importing it raises ImportError.

    Raises:
        RuntimeError: FastVideo has made process groups of its own already.
    """
    global _installation
    if _installation is not None:
        return
    theirs = sys.modules.get(f"{_PACKAGE}.parallel_state")
    if theirs is not None and getattr(theirs, "_WORLD", None) is not None:
        raise RuntimeError(
            "fastvideo.distributed is initialized already; call install() before it is, or after its "
            "cleanup_dist_env_and_memory()"
        )
    _installation = _Installation()
    sys.meta_path.insert(0, _installation.finder)
    if _installation.modules:
        importlib.import_module(_PACKAGE)
        _rebind(_installation)


def uninstall() -> None:
    """Undo `install`: FastVideo's own modules are back, in ``sys.modules`` and where its modules hold names of fvops.

    That is what `install` replaced, and what modules took from ``fastvideo.distributed`` while it was fvops, for which
    FastVideo's own is imported; a name that it lacks, or cannot be imported for, stays fvops', with a warning. Objects
    that were made with fvops meanwhile stay what they are.
    """
    global _installation
    if _installation is None:
        return
    sys.meta_path.remove(_installation.finder)
    for module, attribute, theirs, ours in _installation.bindings:
        if getattr(module, attribute, None) is ours:
            setattr(module, attribute, theirs)
    for name in [name for name in sys.modules if name in _TARGETS]:
        del sys.modules[name]
    sys.modules.update(_installation.modules)
    parent = sys.modules.get("fastvideo")
    if parent is not None:
        if _PACKAGE in _installation.modules:
            parent.distributed = _installation.modules[_PACKAGE]  # type: ignore[attr-defined]
        elif hasattr(parent, "distributed"):
            del parent.distributed
    _installation = None
    _hand_back()


def _rebind(installation: _Installation) -> None:
    """In the modules of FastVideo that are loaded, put ours where something of the old ``distributed`` is."""
    for name, module in list(sys.modules.items()):
        if not name.startswith("fastvideo") or isinstance(module, _Alias) or module is None:
            continue
        for attribute, theirs in list(vars(module).items()):
            home = _home(installation, theirs)
            if home is None:
                continue
            ours = home if isinstance(theirs, ModuleType) else getattr(home, getattr(theirs, "__qualname__", ""), None)
            if ours is None:
                logger.warning(
                    "%s.%s stays FastVideo's own and knows nothing of fvops' groups: %s is fvops' here, which lacks it",
                    name,
                    attribute,
                    home.__name__,
                )
                continue
            setattr(module, attribute, ours)
            installation.bindings.append((module, attribute, theirs, ours))


def _hand_back() -> None:
    """In the modules of FastVideo that are loaded, put FastVideo's own where something is that came from fvops."""
    for name, module in list(sys.modules.items()):
        if not name.startswith("fastvideo") or module is None or f"{name}.".startswith(f"{_PACKAGE}."):
            continue
        for attribute, ours in list(vars(module).items()):
            places = _places(ours)
            theirs = next(filter(None, map(_own, places)), None)
            if theirs is not None:
                setattr(module, attribute, theirs)
            elif places:
                where = " or ".join(place for place, _ in places)
                logger.warning("%s.%s stays fvops': FastVideo's cannot be had from %s here", name, attribute, where)


def _places(ours: Any) -> list[tuple[str, str]]:
    """(module of FastVideo, name there; "" for the module itself): from where `ours` can have come. Others: none."""
    if isinstance(ours, _Alias):
        return [(ours.__name__, "")]
    qualname = getattr(ours, "__qualname__", None)
    if not isinstance(qualname, str) or not str(getattr(ours, "__module__", "")).startswith("fvops"):
        return []
    found = []
    # What the package gives comes from one of its modules: those first.
    for theirs, target in reversed(_TARGETS.items()):
        loaded = sys.modules.get(target)
        if loaded is not None and getattr(loaded, qualname, None) is ours:
            found.append((theirs, qualname))
    return found


def _own(place: tuple[str, str]) -> Any:
    """FastVideo's own object there; None where it has none, or its module cannot be imported."""
    module, name = place
    try:
        own = importlib.import_module(module)
    except ImportError:
        return None
    return getattr(own, name, None) if name else own


def _home(installation: _Installation, theirs: Any) -> ModuleType | None:
    """Ours of the module of the old ``distributed`` that `theirs` is, or comes from; None for anything else."""
    if isinstance(theirs, ModuleType):
        known = installation.modules.get(theirs.__name__) is theirs and theirs.__name__ in _TARGETS
        return importlib.import_module(theirs.__name__) if known else None
    home = getattr(theirs, "__module__", None)
    if not isinstance(home, str) or home not in installation.modules or home not in _TARGETS:
        return None
    return importlib.import_module(home)
