"""install() and uninstall(), on a small stand-in for FastVideo; and the names that FastVideo 0.2.1 itself imports.

The pinned list was generated from the 0.2.1 wheel: every ``from fastvideo.distributed... import`` outside of
``distributed`` and its tests, with the parameters of the functions among them.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fvops
from fvops import parallel_state
from fvops.integrations import fastvideo as integration

NAMES = json.loads((Path(__file__).parent / "data" / "fastvideo_0.2.1_names.json").read_text())
FILES = {
    "__init__.py": "",
    "distributed/__init__.py": "from fastvideo.distributed.parallel_state import get_sp_group\n",
    "distributed/parallel_state.py": (
        "_WORLD = None\ndef get_sp_group():\n    return 'theirs'\nclass GroupCoordinator: ...\n"
    ),
    "distributed/communication_op.py": "",
    "layers.py": (
        "from fastvideo.distributed.parallel_state import get_sp_group as current, GroupCoordinator\n"
        "import fastvideo.distributed.parallel_state as state\n"
        "import fastvideo.distributed\n"
        "def group():\n    return current()\n"
        "def through_package():\n    return fastvideo.distributed.get_sp_group\n"
    ),
}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package `fastvideo` that can be imported, and afterwards no trace of it."""
    for name, text in FILES.items():
        path = tmp_path / "fastvideo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    integration.uninstall()
    for name in [name for name in sys.modules if name.split(".")[0] == "fastvideo"]:
        del sys.modules[name]


def _layers() -> Any:
    return importlib.import_module("fastvideo.layers")


def test_installed_before_fastvideo_is_imported(stand_in: None) -> None:
    integration.install()
    layers = _layers()
    assert layers.current is parallel_state.get_sp_group
    assert layers.GroupCoordinator is fvops.GroupCoordinator
    assert layers.through_package() is fvops.get_sp_group
    with pytest.raises(RuntimeError, match="not initialized"):
        layers.group()


def test_installed_after_fastvideo_was_imported(stand_in: None) -> None:
    layers = _layers()
    assert layers.group() == "theirs"
    integration.install()
    integration.install()
    assert layers.current is parallel_state.get_sp_group
    assert layers.GroupCoordinator is fvops.GroupCoordinator
    assert layers.state.get_sp_group is parallel_state.get_sp_group
    assert layers.through_package() is fvops.get_sp_group
    assert importlib.import_module("fastvideo.distributed.utils").divide is fvops.divide


@pytest.mark.parametrize("before", [True, False])
def test_uninstall_puts_everything_back(stand_in: None, before: bool) -> None:
    if not before:
        _layers()
    integration.install()
    layers = _layers()
    integration.uninstall()
    integration.uninstall()
    assert not any(isinstance(finder, integration._Finder) for finder in sys.meta_path)
    if before:
        sys.modules.pop("fastvideo.layers")
        layers = _layers()
    assert layers.group() == "theirs"
    assert layers.state.get_sp_group() == "theirs"
    assert layers.through_package()() == "theirs"
    assert importlib.import_module("fastvideo.distributed").get_sp_group() == "theirs"


def test_a_name_that_fvops_lacks_is_warned_about(stand_in: None, caplog: pytest.LogCaptureFixture) -> None:
    layers = _layers()
    layers.state.frobnicate = type("frobnicate", (), {"__module__": layers.state.__name__})
    layers.renamed = layers.state.frobnicate
    target = logging.getLogger(integration.__name__)
    target.addHandler(caplog.handler)
    try:
        integration.install()
    finally:
        target.removeHandler(caplog.handler)
    (text,) = {record.getMessage() for record in caplog.records}
    assert text.startswith("fastvideo.layers.renamed stays FastVideo's own")
    assert "fastvideo.distributed.parallel_state is fvops' here" in text


def test_what_a_module_took_while_installed_stays_until_it_is_imported_afresh(stand_in: None) -> None:
    integration.install()
    layers = _layers()
    integration.uninstall()
    assert layers.current is parallel_state.get_sp_group
    assert importlib.reload(layers).group() == "theirs"


def test_groups_that_fastvideo_made_are_not_pulled_away(stand_in: None) -> None:
    _layers().state._WORLD = object()
    with pytest.raises(RuntimeError, match="initialized already"):
        integration.install()
    assert _layers().group() == "theirs"


def test_what_has_no_counterpart_is_refused_by_name(stand_in: None) -> None:
    integration.install()
    with pytest.raises(ImportError, match="ulysses_a2a"):
        importlib.import_module("fastvideo.distributed.device_communicators.ulysses_a2a")
    with pytest.raises(AttributeError, match=r"fastvideo\.distributed is fvops here, which has no 'frobnicate'"):
        _ = importlib.import_module("fastvideo.distributed").frobnicate


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in NAMES.items() for name in names], ids=str
)
def test_every_name_that_fastvideo_imports_is_there(stand_in: None, module: str, name: str) -> None:
    integration.install()
    found = getattr(importlib.import_module(module), name)
    wanted = NAMES[module][name]
    if wanted is not None:
        parameters = inspect.signature(found).parameters
        assert list(parameters)[: len(wanted)] == wanted
        assert all(p.default is not p.empty for p in list(parameters.values())[len(wanted) :])
