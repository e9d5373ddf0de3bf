"""What FastVideo's own code takes from ``fastvideo.distributed``: names, parameters, defaults, methods; from its wheel.

    python -m tools.fastvideo_names FOLDER > tests/data/fastvideo_0.2.1_names.json

FOLDER holds the unpacked wheel. Its files are parsed, not imported. Of a function its parameters are told, each as
``[name, default]``, the default as it is written and null where there is none; of a class each public method and
property; null of anything else.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["names_taken"]

_PACKAGE = "fastvideo.distributed"


def names_taken(folder: Path) -> dict[str, dict[str, Any]]:
    """By module of ``fastvideo.distributed``: each name that a module outside of it takes, and what that is."""
    taken: dict[str, set[str]] = {}
    for path in sorted((folder / "fastvideo").rglob("*.py")):
        if path.relative_to(folder / "fastvideo").parts[0] != "distributed":
            for module, name in _taken_by(ast.parse(path.read_text())):
                taken.setdefault(module, set()).add(name)
    found: dict[str, dict[str, Any]] = {}
    for module, names in sorted(taken.items()):
        for name in sorted(names):
            if _file(folder, f"{module}.{name}") is None:  # not itself a module
                found.setdefault(module, {})[name] = _described(folder, module, name)
    return found


def _taken_by(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name): imported from it, or looked up in it under the name that the module has here."""
    here: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{_PACKAGE}.") and not node.level:
            for alias in node.names:
                yield str(node.module), alias.name
        elif isinstance(node, ast.Import):
            here |= {alias.asname: alias.name for alias in node.names if alias.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = here.get(node.value.id, "")
            if f"{module}.".startswith(f"{_PACKAGE}."):
                yield module, node.attr


def _file(folder: Path, module: str) -> Path | None:
    path = folder.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.exists():
            return candidate
    return None


def _described(folder: Path, module: str, name: str) -> Any:
    path = _file(folder, module)
    if path is None:
        raise ValueError(f"FastVideo imports {name} from {module}, which the wheel in {folder} does not have")
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _parameters(node)
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _members(node)
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            return _described(folder, str(node.module), name)
    return None


def _members(node: ast.ClassDef) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and (member.name == "__init__" or not member.name.startswith("_")):
            decorators = [ast.unparse(decorator) for decorator in member.decorator_list]
            members[member.name] = None if "property" in decorators else _parameters(member)
    return members


def _parameters(node: ast.FunctionDef) -> list[list[str | None]]:
    """``[name, default]`` of each but self, ``*`` and ``**`` before the names of such."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    without = len(positional) - len(arguments.defaults)
    defaults = [None] * without + [ast.unparse(default) for default in arguments.defaults]
    found = [[one.arg, default] for one, default in zip(positional, defaults, strict=True)]
    if arguments.vararg is not None:
        found.append([f"*{arguments.vararg.arg}", None])
    for one, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append([one.arg, None if value is None else ast.unparse(value)])
    if arguments.kwarg is not None:
        found.append([f"**{arguments.kwarg.arg}", None])
    return [pair for pair in found if pair[0] not in ("self", "cls")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(json.dumps(names_taken(parser.parse_args().folder), indent=1))
