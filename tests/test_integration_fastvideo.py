"""install() and uninstall(), on a small stand-in for FastVideo; and the names that FastVideo 0.2.1 itself imports.

The pinned list is what `tools/fastvideo_names.py` makes of the 0.2.1 wheel; it is made again, and compared, where
``FASTVIDEO_DIR`` names a folder with the unpacked wheel.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fvops
from fvops import parallel_state
from fvops.integrations import fastvideo as integration
from tools.fastvideo_names import names_taken

NAMES = json.loads((Path(__file__).parent / "data" / "fastvideo_0.2.1_names.json").read_text())
# FastVideo's fused all-to-all, which only its own tests import by name.
REFUSED = "fastvideo.distributed.device_communicators.ulysses_a2a"
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


@contextlib.contextmanager
def _heard(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Inside, `caplog` hears the integration's logger, whoever else does."""
    target = logging.getLogger(integration.__name__)
    target.addHandler(caplog.handler)
    try:
        yield
    finally:
        target.removeHandler(caplog.handler)


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
    with _heard(caplog):
        integration.install()
    (text,) = {record.getMessage() for record in caplog.records}
    assert text.startswith("fastvideo.layers.renamed stays FastVideo's own")
    assert "fastvideo.distributed.parallel_state is fvops' here" in text


def test_what_a_module_took_while_installed_is_handed_back(stand_in: None) -> None:
    integration.install()
    layers = _layers()
    layers.kept_under_another_name = layers.current
    layers.of_ours_alone = fvops.compiler.enable
    integration.uninstall()
    assert layers.group() == layers.kept_under_another_name() == layers.state.get_sp_group() == "theirs"
    assert layers.GroupCoordinator.__module__ == "fastvideo.distributed.parallel_state"
    assert layers.of_ours_alone is fvops.compiler.enable


def test_what_fastvideo_cannot_have_back_stays_and_is_warned_about(
    stand_in: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own module cannot be imported here, or lacks the name."""
    (tmp_path / "fastvideo" / "distributed" / "communication_op.py").write_text("import no_such_package\n")
    integration.install()
    layers = _layers()
    layers.reduce = importlib.import_module("fastvideo.distributed.communication_op").tensor_model_parallel_all_reduce
    with _heard(caplog):
        integration.uninstall()
    assert layers.reduce is fvops.tensor_model_parallel_all_reduce
    assert layers.group() == "theirs"
    (text,) = {record.getMessage() for record in caplog.records}
    assert text.startswith("fastvideo.layers.reduce stays fvops'")


def test_groups_that_fastvideo_made_are_not_pulled_away(stand_in: None) -> None:
    _layers().state._WORLD = object()
    with pytest.raises(RuntimeError, match="initialized already"):
        integration.install()
    assert _layers().group() == "theirs"


def test_what_has_no_counterpart_is_refused_by_name(stand_in: None) -> None:
    integration.install()
    with pytest.raises(ImportError, match="ulysses_a2a"):
        importlib.import_module(REFUSED)
    with pytest.raises(AttributeError, match=r"fastvideo\.distributed is fvops here, which has no 'frobnicate'"):
        _ = importlib.import_module("fastvideo.distributed").frobnicate


def _accepts(ours: Any, theirs: list[list[str | None]]) -> list[str]:
    """What of the calls that FastVideo's function takes ours does not: names, their order, defaults."""
    parameters = [p for p in inspect.signature(ours).parameters.values() if p.name != "self"]
    wrong = []
    for index, (name, default) in enumerate(theirs):
        if index >= len(parameters) or parameters[index].name != str(name).lstrip("*"):
            wrong.append(f"{name} is not parameter {index}")
        elif default is not None and parameters[index].default is inspect.Parameter.empty:
            wrong.append(f"{name} has no default")
        elif default is not None:
            with contextlib.suppress(ValueError):  # no literal, like ReduceOp.SUM
                if ast.literal_eval(default) != parameters[index].default:
                    wrong.append(f"{name} is {parameters[index].default!r} by default, not {default}")
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    more = [p for p in parameters[len(theirs) :] if p.default is p.empty and p.kind not in variadic]
    return wrong + [f"{p.name} is not FastVideo's and has no default" for p in more]


@pytest.mark.parametrize(
    ("module", "name"),
    [(module, name) for module, names in NAMES.items() for name in names if module != REFUSED],
    ids=str,
)
def test_every_name_that_fastvideo_imports_is_there(stand_in: None, module: str, name: str) -> None:
    integration.install()
    found, wanted = getattr(importlib.import_module(module), name), NAMES[module][name]
    if isinstance(wanted, list):
        assert _accepts(found, wanted) == []
    elif wanted is not None:
        for member, parameters in wanted.items():
            assert hasattr(found, member) or member in found.__annotations__, member
            if parameters is not None:
                assert _accepts(getattr(found, member), parameters) == [], member


@pytest.mark.skipif(
    "FASTVIDEO_DIR" not in os.environ, reason="FASTVIDEO_DIR does not name a folder with FastVideo's wheel"
)
def test_the_pinned_names_are_the_wheel_s() -> None:
    assert names_taken(Path(os.environ["FASTVIDEO_DIR"])) == NAMES


def test_names_are_found_where_they_are_defined(tmp_path: Path) -> None:
    for name, text in FILES.items():
        path = tmp_path / "fastvideo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "fastvideo" / "more.py").write_text(
        "from fastvideo.distributed import get_sp_group\nimport fastvideo.distributed.parallel_state as ps\nps._WORLD\n"
    )
    assert names_taken(tmp_path) == {
        "fastvideo.distributed": {"get_sp_group": []},
        "fastvideo.distributed.parallel_state": {"GroupCoordinator": {}, "_WORLD": None, "get_sp_group": []},
    }


def test_what_a_call_of_fastvideo_would_miss_is_told() -> None:
    def ours(a: int, c: int, b: int = 1, *, d: int) -> None: ...

    assert _accepts(ours, [["a", None], ["b", "1"]]) == [
        "b is not parameter 1",
        "d is not FastVideo's and has no default",
    ]
    assert _accepts(ours, [["a", "3"], ["c", None], ["b", "2"], ["d", None]]) == [
        "a has no default",
        "b is 1 by default, not 2",
    ]
