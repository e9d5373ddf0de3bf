"""The side stream on which a CUDA graph is captured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["GraphCaptureContext", "capture_on_side_stream"]


@dataclass
class GraphCaptureContext:
    """Where a capture runs; one may serve the captures of several groups.

    Attributes:
        stream: a ``torch.cuda.Stream``.
    """

    stream: Any


@contextlib.contextmanager
def capture_on_side_stream(device: torch.device, context: Any | None) -> Iterator[Any]:
    """Make the context's stream (default: a new one) the current one inside; before and after, the streams wait.

    Anything that is captured must run on another stream than the default one. Not on CUDA: `context` is handed back.
    """
    if device.type != "cuda":
        yield context
        return
    context = GraphCaptureContext(torch.cuda.Stream(device)) if context is None else context
    outside = torch.cuda.current_stream(device)
    context.stream.wait_stream(outside)
    try:
        with torch.cuda.stream(context.stream):
            yield context
    finally:
        outside.wait_stream(context.stream)
