"""What goes wrong at run time, as each rank lives through it: the workers' side of `fault_suite`."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import torch

from tests.doubles.bodies import cpu_group, double, error_of, fresh, kind, text_of
from tests.waiting import wait_until

__all__ = ["DEADLINE_S", "in_call", "in_life"]

DEADLINE_S = 1.5
ERROR, HANG, ASYNC, IN_PROGRESS = 1, 2, 3, 4
_PREFIX = {"nccl": "nccl", "hccl": "Hccl"}
_MANY = 100_000  # floats: more than the double's mailbox


class Scene:
    """One rank's view: `culprit` is the rank whose library misbehaves."""

    def __init__(self, which: str, path: str, culprit: int) -> None:
        self.which, self.path, self.culprit = which, path, culprit
        self.rank, self.P = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.guilty = self.rank == culprit
        self.comm: Any = None

    def inject(self, function: str, what: int, code: int = 0, nth: int = 1) -> None:
        """On the culprit only."""
        if self.guilty:
            double(self.path).double_fault(f"{_PREFIX[self.which]}{function}".encode(), nth, what, code)

    def start(self, deadline_s: float = DEADLINE_S) -> None:
        """A communicator that has worked once."""
        self.comm = fresh(self.which, self.path, deadline_s)
        assert self.comm.all_reduce(torch.ones(2)).tolist() == [self.P] * 2
        self.meet()

    def meet(self) -> None:
        """Wait for all ranks, by other means than the library."""
        torch.distributed.barrier(group=cpu_group())


def in_call(which: str, path: str, scene: str, culprit: int) -> dict[str, Any]:
    """Run a scene and tell: "text" of what the call raised, "later" of the next call, "reason", "broken"."""
    s = Scene(which, path, culprit)
    s.start()
    error = error_of(lambda: _CALLS[scene](s))
    story = {"text": "" if error is None else f"{type(error).__name__}: {error}", "guilty": s.guilty}
    story["later"] = text_of(lambda: s.comm.broadcast(torch.ones(1), 0)) if s.comm.broken else ""
    story["reason"], story["broken"] = s.comm.abort_reason, s.comm.broken
    story["group_left"] = text_of(s.comm.group_end)
    s.meet()
    s.comm.destroy()
    s.comm.destroy()
    story["destroyed"] = text_of(lambda: s.comm.all_reduce(torch.ones(1)))
    return story


def _error(s: Scene) -> None:
    s.inject("AllReduce", ERROR, 4)
    s.comm.all_reduce(torch.ones(3))


def _hang(s: Scene) -> None:
    s.inject("AllReduce", HANG)
    s.comm.all_reduce(torch.ones(3))


def _absent(s: Scene) -> None:
    if not s.guilty:
        s.comm.all_reduce(torch.ones(3))


def _unreceived(s: Scene) -> None:
    if s.guilty:
        s.comm.send(torch.ones(_MANY), (s.rank + 1) % s.P)


def _unanswered_group(s: Scene) -> None:
    if s.guilty:
        s.comm.group_start()
        s.comm.group_start()
        s.comm.send(torch.ones(_MANY), (s.rank + 1) % s.P)
        s.comm.recv(torch.ones(_MANY), (s.rank + 1) % s.P)
        s.comm.group_end()
        s.comm.group_end()


def _error_in_group(s: Scene) -> None:
    """The failed call closes the group."""
    s.inject("Recv" if s.which == "nccl" else "BatchSendRecv", ERROR, 4)
    if s.guilty:
        s.comm.group_start()
        s.comm.recv(torch.ones(1), (s.rank + 1) % s.P)
        s.comm.group_end()


def _async(s: Scene) -> None:
    """The call with the error is done well; the watchdog finds the error on its own."""
    s.inject("AllReduce", ASYNC, 4)
    s.comm.all_reduce(torch.ones(3))
    if s.guilty:
        wait_until(lambda: bool(s.comm.broken))
        s.comm.all_reduce(torch.ones(3))


def _two_threads(s: Scene) -> None:
    """The second thread's call waits for the first one's, and fails with it."""
    texts: list[str] = []
    if s.guilty:
        return
    thread = threading.Thread(target=lambda: texts.append(text_of(lambda: s.comm.all_reduce(torch.ones(3)))))
    thread.start()
    wait_until(lambda: s.comm._watchdog._current is not None)
    try:
        s.comm.broadcast(torch.ones(3), 0)
    finally:
        thread.join(30)
        assert "did not return within its deadline" in texts[0], texts


def _never_taken(s: Scene) -> None:
    """NCCL says "in progress" for ever."""
    s.inject("AllReduce", IN_PROGRESS, 1_000_000_000)
    s.comm.all_reduce(torch.ones(3))


_CALLS: dict[str, Callable[[Scene], None]] = {
    "error": _error,
    "hang": _hang,
    "absent": _absent,
    "unreceived": _unreceived,
    "unanswered group": _unanswered_group,
    "error in a group": _error_in_group,
    "async": _async,
    "two threads": _two_threads,
    "never taken": _never_taken,
}


def in_life(which: str, path: str, scene: str, culprit: int) -> tuple[str, Any]:
    """Run a scene about the beginning or the end of a communicator."""
    os.environ["HCCL_CONNECT_TIMEOUT"] = "2"
    s = Scene(which, path, culprit)
    result = _LIVES[scene](s)
    for thread in threading.enumerate():  # HCCL's initialisation cannot be aborted: it ends at its own time limit
        if thread.name.startswith("start of "):
            thread.join(20)
    s.meet()
    return result


def _late_rank(s: Scene) -> tuple[str, Any]:
    """The culprit takes part in the exchange and then does not initialise."""

    class Absent(kind(s.which)):  # type: ignore[misc]
        def _connect(self, unique_id: bytes, deadline_s: float) -> int | None:
            return None

    os.environ["FVOPS_TIMEOUT_S"] = "1"
    try:
        return text_of(lambda: (Absent if s.guilty else kind(s.which))(cpu_group(), "cpu", s.path)), None
    finally:
        os.environ["FVOPS_TIMEOUT_S"] = "60"


def _no_id(s: Scene) -> tuple[str, Any]:
    s.inject("GetUniqueId" if s.which == "nccl" else "GetRootInfo", ERROR, 4)
    return text_of(lambda: fresh(s.which, s.path)), None


def _failed_init(s: Scene) -> tuple[str, Any]:
    s.inject("CommInitRankConfig" if s.which == "nccl" else "CommInitRootInfo", ERROR, 4)
    return text_of(lambda: fresh(s.which, s.path, 1.0)), None


def _endless_destroy(s: Scene) -> tuple[str, Any]:
    s.start()
    s.inject("CommDestroy", HANG)
    s.comm.destroy(0.5)
    s.comm.destroy()
    return str(s.comm.abort_reason), s.comm.comm


def _failed_destroy(s: Scene) -> tuple[str, Any]:
    s.start()
    s.inject("CommDestroy", ERROR, 4)
    s.comm.destroy()
    return str(s.comm.abort_reason), s.comm.comm


def _endless_finalize(s: Scene) -> tuple[str, Any]:
    s.start()
    s.inject("CommFinalize", HANG)
    s.comm.destroy(0.5)
    return str(s.comm.abort_reason), s.comm.comm


def _one_without_library(s: Scene) -> tuple[str, Any]:
    comm = fresh(s.which, "/no/such/library.so" if s.guilty else s.path)
    text = text_of(lambda: comm.all_reduce(torch.ones(1)))
    comm.destroy()
    return text, (comm.available, comm.disabled)


_LIVES: dict[str, Callable[[Scene], tuple[str, Any]]] = {
    "late rank": _late_rank,
    "no id": _no_id,
    "failed init": _failed_init,
    "endless destroy": _endless_destroy,
    "failed destroy": _failed_destroy,
    "endless finalize": _endless_finalize,
    "one without library": _one_without_library,
}
