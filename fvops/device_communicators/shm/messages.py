"""send and recv: messages in pieces, through channels of their own.

A message that fits into the free slots is gone when `send` returns. A larger one is copied, and a thread for that
destination pushes it as the receiver drains: so `send` never waits, and a ring in which every rank sends first does not
deadlock. Later messages to that place queue behind it. A thread for each destination, since a receiver that is not
there yet must not hold up the others.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

from fvops.device_communicators.shm.channel import Inlet, Outlet
from fvops.device_communicators.shm.op_codes import code
from fvops.device_communicators.shm.segment_layout import SLOTS
from fvops.device_communicators.shm.watch import PeerError, Watch

__all__ = ["Messages"]

_SEND = code("send")


class Messages:
    """The messages of one rank; `outlets` and `inlets` are by place."""

    def __init__(self, watch: Watch, outlets: Mapping[int, Outlet], inlets: Mapping[int, Inlet], name: str) -> None:
        self._inlets = inlets
        self._receiving = {place: threading.Lock() for place in inlets}
        self._backlogs = {place: _Backlog(watch, outlet, place, name) for place, outlet in outlets.items()}

    def send(self, x: Tensor, place: int) -> None:
        """Send `x`, any strides, to `place`; `x` may be overwritten when this returns."""
        # Bytes are sent, which a lazily conjugated or negated tensor does not have yet.
        self._backlogs[place].send(x.resolve_conj().resolve_neg())

    def recv(self, output: Tensor, place: int) -> None:
        """Fill `output` (contiguous) with the next message of `place`. PeerError if that has another size."""
        with self._receiving[place]:
            inlet, flat = self._inlets[place], _as_bytes(output)
            for piece in _flat_pieces(flat, inlet.slot_bytes):
                inlet.pull(_SEND, piece, flat.numel())

    def drain(self, timeout_s: float) -> None:
        """Wait for the open sends. RuntimeError, naming the receivers, if any is open after `timeout_s` seconds."""
        until = time.monotonic() + timeout_s
        late = [place for place, backlog in self._backlogs.items() if not backlog.wait(until - time.monotonic())]
        if late:
            raise RuntimeError(f"sends to places {late} were not received within {timeout_s:g} s")


class _Backlog:
    """Messages to one place that wait for their receiver."""

    def __init__(self, watch: Watch, outlet: Outlet, place: int, name: str) -> None:
        self._watch = watch
        self._outlet = outlet
        self._place = place
        self._name = name
        self._lock = threading.Lock()
        self._queue: deque[Tensor] = deque()
        self._thread: threading.Thread | None = None

    def send(self, x: Tensor) -> None:
        with self._lock:
            nbytes = x.numel() * x.element_size()
            slot_bytes = self._outlet.slot_bytes
            # A queued message stays in the queue until it is pushed, so order is kept.
            fits = nbytes <= SLOTS * slot_bytes and -(-nbytes // slot_bytes) <= self._outlet.free_slots() - (not nbytes)
            if fits and not self._queue:
                self._push(_as_bytes(x.contiguous()))
                return
            self._queue.append(_as_bytes(x.clone(memory_format=torch.contiguous_format)))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"fvops sends of {self._name}", daemon=True)
                self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        thread = self._thread
        if thread is not None:
            thread.join(max(0.0, timeout_s))
        return not self._queue

    def _push(self, flat: Tensor) -> None:
        for piece in _flat_pieces(flat, self._outlet.slot_bytes):
            self._outlet.push(_SEND, piece, flat.numel())

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._thread = None
                    return
                flat = self._queue[0]
            try:
                self._push(flat)
            except PeerError as error:
                self._watch.fail(f"an earlier send to place {self._place} was not received: {error}", self._place)
                return
            with self._lock:
                self._queue.popleft()
            del flat


def _as_bytes(x: Tensor) -> Tensor:
    """A contiguous tensor's memory as flat uint8."""
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)


def _flat_pieces(flat: Tensor, slot_bytes: int) -> list[Tensor]:
    """The pieces of a message; one, empty, of an empty message, which the receiver must see arrive too."""
    return list(flat.split(slot_bytes))
