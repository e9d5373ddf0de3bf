"""Where in the user's program something comes from: the innermost line that is neither torch's nor fvops'."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from traceback import FrameSummary

import torch

__all__ = ["line_of_stack", "line_of_trace"]

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_FVOPS = Path(__file__).parent.parent
_INSIDE = (str(Path(torch.__file__).parent), str(_FVOPS))
# Model code, though ours.
_MODELS = (str(_FVOPS / "integrations"), str(_FVOPS / "graph_report/models.py"))


def line_of_trace(trace: str) -> str:
    """``file:line in function`` from a formatted traceback, "" from one without frames."""
    return _choose([(found["file"], int(found["line"]), found["function"]) for found in _FRAME.finditer(trace)])


def line_of_stack(stack: Sequence[FrameSummary]) -> str:
    """The same from frames, outermost first."""
    return _choose([(frame.filename, frame.lineno or 0, frame.name) for frame in stack])


def _choose(frames: list[tuple[str, int, str]]) -> str:
    outside = [frame for frame in frames if frame[0].startswith(_MODELS) or not frame[0].startswith(_INSIDE)]
    if not frames:
        return ""
    file, line, function = (outside or frames)[-1]
    return f"{file}:{line} in {function}"
