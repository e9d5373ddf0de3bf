"""Where in the user's program something comes from: the innermost line that is not torch's, fvops' or Python's own."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from traceback import FrameSummary

import torch

__all__ = ["is_user_s", "line_of_stack", "line_of_trace"]

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_RESUMED = re.compile(r"^torch_dynamo_resume_in_|_at_\d+$")
_FVOPS = Path(__file__).parent.parent
_INSIDE = (str(Path(torch.__file__).parent), str(_FVOPS), "<frozen ")
_PYTHON = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))
# Under Python's own folder, unless there is a virtual environment.
_PACKAGES = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib"))
# Model code, though ours.
_MODELS = (str(_FVOPS / "integrations"), str(_FVOPS / "graph_report/models.py"))


def line_of_trace(trace: str) -> str:
    """``file:line in function`` from a formatted traceback, "" from one without frames."""
    return _choose([(found["file"], int(found["line"]), found["function"]) for found in _FRAME.finditer(trace)])


def line_of_stack(stack: Sequence[FrameSummary]) -> str:
    """The same from frames, outermost first."""
    return _choose([(frame.filename, frame.lineno or 0, frame.name) for frame in stack])


def is_user_s(where: str) -> bool:
    """Is the line `where`, as these functions tell it, in the user's program?"""
    return where != "" and not _is_inside(where)


def _is_inside(file: str) -> bool:
    if file.startswith(_MODELS):
        return False
    return file.startswith(_INSIDE) or (file.startswith(_PYTHON) and not file.startswith(_PACKAGES))


def _choose(frames: list[tuple[str, int, str]]) -> str:
    outside = [frame for frame in frames if not _is_inside(frame[0])]
    if not frames:
        return ""
    file, line, function = (outside or frames)[-1]
    # What Dynamo calls the rest of a function after a break.
    return f"{file}:{line} in {_RESUMED.sub('', function)}"
