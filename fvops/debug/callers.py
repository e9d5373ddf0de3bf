"""Where in the program a collective was called from: the nearest Python frame that is neither fvops' nor torch's.

A compiled function has no line of its own any more at run time: the frame is then the function that Dynamo compiled,
or that function's caller, whichever is on the stack. In backward it is the line that called ``backward``; a thread of
autograd's own has none at all.
"""

from __future__ import annotations

import contextlib
import os
import sys
from types import FrameType

import torch

__all__ = ["caller"]

_FVOPS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_OPS = os.path.join(_FVOPS, "ops") + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
# Between a ``with`` block of fvops' and what it enters.
_CONTEXTLIB = contextlib.__file__
_DEEPEST = 400


def caller() -> str:
    """``file:line in function``, with what the stack tells beside it: "compiled", "backward of op"."""
    notes: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_DEEPEST):
        if frame is None:
            break
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if path.startswith(_FVOPS):
            if name == "backward" and path.startswith(_OPS):
                notes.append(f"backward of {os.path.basename(path)[:-3]}")
        elif _generated(path):
            notes.append("compiled")
        elif path.startswith(_TORCH):
            if name == "backward" and "_aot_autograd" in path:
                notes.append("backward")
        elif path != _CONTEXTLIB and not path.startswith("<"):
            return _with_notes(f"{path}:{frame.f_lineno} in {name}", notes)
        frame = frame.f_back
    return _with_notes("no Python caller (a thread of autograd's)", notes)


def _generated(path: str) -> bool:
    """Is this the code that Inductor wrote? Its folder differs by version and setting; ours and torch's never."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return "torchinductor_" in path or (folder is not None and path.startswith(folder + os.sep))


def _with_notes(text: str, notes: list[str]) -> str:
    return f"{text} ({', '.join(dict.fromkeys(notes))})" if notes else text
