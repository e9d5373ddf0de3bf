"""Streams and events of the device that a library works on; on CPU, where calls are done when they return, neither.

`torch.cuda` and `torch.npu` offer the same names, so one class serves both.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import torch
from torch import Tensor

from fvops.checks import where
from fvops.device_communicators.library_loading import loaded_library

__all__ = ["Streams", "let_thread_query_during_capture"]

_RELAXED = 2  # cudaStreamCaptureModeRelaxed


class Streams:
    """What a communicator on `device` needs of the device's runtime."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.asynchronous = device.type != "cpu"
        self._runtime: Any = getattr(torch, device.type) if self.asynchronous else None

    def resolve(self, op: str, group_name: str, stream: Any) -> Any:
        """The stream to work on: `stream`, the current one for None; None on CPU.

        Raises:
            TypeError: it is no stream of the device's kind.
        """
        if not self.asynchronous:
            if stream is not None:
                raise TypeError(f"{where(op, group_name)}: calls on {self.device} take no stream, got {stream!r}")
            return None
        if stream is None:
            return self._runtime.current_stream(self.device)
        if not hasattr(stream, f"{self.device.type}_stream"):
            kind = f"torch.{self.device.type}.Stream"
            raise TypeError(f"{where(op, group_name)}: stream must be a {kind} or None, got {type(stream).__name__}")
        return stream

    def handle(self, stream: Any) -> int | None:
        """The library's handle of a stream from `resolve`."""
        return None if stream is None else getattr(stream, f"{self.device.type}_stream")

    def keep(self, stream: Any, *tensors: Tensor) -> None:
        """Have the allocator not hand out the tensors' memory before `stream` is done with it."""
        if stream is not None and stream != self._runtime.current_stream(self.device):
            for tensor in tensors:
                tensor.record_stream(stream)

    def use(self, stream: Any) -> Any:
        """A context in which torch's own operations go to `stream`."""
        return contextlib.nullcontext() if stream is None else self._runtime.stream(stream)

    def use_device(self) -> Any:
        """A context in which the device is the current one, as initialisation wants."""
        return contextlib.nullcontext() if not self.asynchronous else self._runtime.device(self.device)

    def capturing(self) -> bool:
        """Is a graph being captured on the current stream?"""
        return self.asynchronous and self._runtime.is_current_stream_capturing()

    def side(self) -> Any:
        """A new stream beside the current one; None on CPU."""
        return self._runtime.Stream(self.device) if self.asynchronous else None

    def event(self, stream: Any) -> Any:
        """An event after what was issued to `stream`; None on CPU and while a graph is being captured."""
        if stream is None:
            return None
        with self.use(stream):
            if self._runtime.is_current_stream_capturing():
                return None
        return self.mark(stream)

    def mark(self, stream: Any) -> Any:
        """An event after what was issued to `stream`; in a capture, a part of the graph. Not on CPU."""
        event = self._runtime.Event()
        event.record(stream)
        return event


def let_thread_query_during_capture() -> bool:
    """Let this thread query CUDA events while another thread captures a graph; False when that cannot be had.

    By default such a query is an error that also spoils the capture. torch has no Python name for the switch, so it is
    called in the CUDA runtime that torch has loaded.
    """
    path = loaded_library("libcudart.so")
    if path is None:
        return False
    mode = ctypes.c_int(_RELAXED)
    return ctypes.CDLL(path).cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode)) == 0
