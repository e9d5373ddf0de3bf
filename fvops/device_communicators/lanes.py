"""Messages over a collective library: for each ordered pair of ranks a communicator of its own, a *lane*.

A library runs the calls on one communicator one after another. If `send` and `recv` shared one, a ring in which every
rank sends first would wait for ever: here each rank's send is under way on one lane while it receives on another. A
lane is made at its first message, by both ends; the sender's end in a thread, since its receiver may not have come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fvops import store_messages
from fvops.device_communicators.flat_transport import RefusedError
from fvops.device_communicators.library_communicator import LibraryCommunicator
from fvops.device_communicators.library_streams import Streams
from fvops.device_communicators.pending_sends import PendingSends
from fvops.logger import init_logger
from fvops.stateless_process_group import StatelessProcessGroup

__all__ = ["Lanes"]

logger = init_logger(__name__)


class Lanes:
    """The lanes of one rank.

    Args:
        make: builds a communicator of two ranks from their group and its name.
        prefix: of the store's keys; no other group, now or earlier, may have the same.
        rank: this rank's place.
        streams: of the device.
        timeout_s: deadline of the wait for a lane's other end, seconds.
    """

    def __init__(
        self,
        make: Callable[[StatelessProcessGroup, str], LibraryCommunicator],
        prefix: str,
        rank: int,
        streams: Streams,
        timeout_s: float,
    ) -> None:
        self._make = make
        self._prefix = prefix
        self._rank = rank
        self._streams = streams
        self._timeout_s = timeout_s
        self._out: dict[int, _OutgoingLane] = {}
        self._in: dict[int, LibraryCommunicator] = {}

    def send(self, buffer: Tensor, dst: int) -> None:
        """Send `buffer`, which nobody else writes, to place `dst`; RuntimeError when an earlier message failed."""
        if dst not in self._out:
            name = f"{self._prefix}/{self._rank}-{dst}"
            self._out[dst] = _OutgoingLane(lambda: self._open(name, 0), name, self._streams)
        self._out[dst].send(buffer)

    def recv(self, buffer: Tensor, src: int) -> None:
        """Fill `buffer` with what place `src` sends."""
        if src not in self._in:
            if self._streams.capturing():
                raise RefusedError(
                    f"the first message from place {src} is inside a CUDA-graph capture, where no connection can be "
                    "made; receive one before capturing"
                )
            self._in[src] = self._open(f"{self._prefix}/{src}-{self._rank}", 1)
        self._in[src].recv(buffer, 0)

    def close(self, timeout_s: float) -> None:
        """Wait for open sends, at most so many seconds each way; one that was not received is reported as a warning."""
        for lane in self._out.values():
            lane.close(timeout_s)
        for comm in self._in.values():
            comm.destroy()
        self._out, self._in = {}, {}

    def _open(self, name: str, end: int) -> LibraryCommunicator:
        """This end, 0 sends and 1 receives, of the lane `name`; waits for the other."""
        # The wait for the other end, here often in a thread, must not hold up what the rank asks the default store.
        store = store_messages.own_client(dist.distributed_c10d._get_default_store(), "fvops/lanes")
        pair = StatelessProcessGroup.over_store(store, name, end, 2, timeout_s=self._timeout_s)
        comm = self._make(pair, name)
        if not comm.available:
            raise RuntimeError(f"{comm.NAME} could start for the group, but not for two of its ranks")
        return comm


class _OutgoingLane:
    def __init__(self, make: Callable[[], LibraryCommunicator], name: str, streams: Streams) -> None:
        self._make = make
        self._name = name
        self._streams = streams
        self._sends = PendingSends(name)
        self._comm: LibraryCommunicator | None = None
        self._stream: Any = None

    def send(self, buffer: Tensor) -> None:
        if self._streams.capturing():
            if self._comm is None:
                raise RefusedError(
                    f"the first message of {self._name} is inside a CUDA-graph capture, where no connection can be "
                    "made; send one before capturing"
                )
            # A captured stream may not be joined by a thread's: here the send is in line with the rest of the graph.
            self._comm.send(buffer, 1)
            return
        self._sends.raise_failure()
        ready = self._streams.event(self._streams.resolve("send", self._name, None))
        self._sends.add(lambda: self._see_through(buffer, ready), buffer)

    def close(self, timeout_s: float) -> None:
        try:
            self._sends.drain(timeout_s)
        except RuntimeError as error:
            logger.warning("closing the messages of %s: %s", self._name, error)
        if self._comm is not None:
            self._comm.destroy()

    def _see_through(self, buffer: Tensor, ready: Any) -> None:
        with self._streams.use_device():
            if self._comm is None:
                self._comm = self._make()
                self._stream = self._streams.side()
            if self._stream is not None:
                self._stream.wait_event(ready)
            self._comm.send(buffer, 1, stream=self._stream)
