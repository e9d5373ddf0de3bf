"""Carrying out one fault of `tests/fault_table.py`: what each rank does, and what the survivors write down."""

from __future__ import annotations

import _thread
import contextlib
import errno
import gc
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests import harness
from tests.fault_table import FAULTS, Fault
from tests.remains import held
from tests.waiting import wait_until

__all__ = ["DEADLINE_S", "suffer"]

DEADLINE_S = 5.0
# A module global, for the compiled program to find the group anew when it was created again.
_group: Any = None


def _program(x: Tensor) -> Tensor:
    return _group.all_gather(_group.all_to_all_4D(x, 2, 1) + 1, 1)


def suffer(name: str, mode: str, folder: str, port: int) -> None:
    """Run the fault `name`; every rank that survives leaves a JSON file in `folder`."""
    import torch.distributed as dist

    import fvops

    (fault,) = [fault for fault in FAULTS if fault.name == name]
    P, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    culprit = fault.culprit(P)
    before = held()
    if fault.act == "server":
        os.environ["FVOPS_TEST_INIT"], file = f"tcp://127.0.0.1:{port}", os.environ["FVOPS_TEST_INIT"]
        harness.init_fvops(sp_size=1)
        os.environ["FVOPS_TEST_INIT"] = file
    else:
        harness.init_fvops(sp_size=1, suffix="a")
    dist.distributed_c10d._get_default_store().set(f"pid/{rank}", str(os.getpid()))
    program = _warm(mode, P)
    error, seconds = "", 0.0
    try:
        error, seconds = _meet(fault, program, rank == culprit, P)
    finally:
        if fault.act == "stop":
            _end_the_stopped(rank, P)
        fvops.cleanup_dist_env_and_memory()
    again = _start_over(fault, rank, P, culprit)
    gc.collect()
    with contextlib.suppress(AssertionError):  # the test shows what is held
        wait_until(lambda: held() == before, 5.0)  # threads end a moment after they are told to
    story = {"error": error, "seconds": seconds, "again": again, "held": [before, held()]}
    Path(folder, str(rank)).write_text(json.dumps(story))


def _warm(mode: str, P: int) -> Callable[[Tensor], Tensor]:
    """The program, compiled already, over a group with a long deadline: ranks compile at their own pace."""
    global _group
    from fvops.parallel_state import get_world_group, init_model_parallel_group

    program = torch.compile(_program, fullgraph=True) if mode == "compiled" else _program
    _group = init_model_parallel_group([list(range(P))], 0, "gloo", group_name="brief")
    program(_input(P))
    get_world_group().barrier()
    _group.destroy()
    get_world_group().barrier()
    return program


def _input(P: int) -> Tensor:
    return torch.ones(1, 2, P, 2)


def _meet(fault: Fault, program: Callable[[Tensor], Tensor], guilty: bool, P: int) -> tuple[str, float]:
    """What this rank was told, and after how many seconds."""
    global _group
    from fvops.debug import check_collectives
    from fvops.parallel_state import init_model_parallel_group

    if fault.act == "full":
        return _told(lambda: _without_room(guilty, P))
    _group = init_model_parallel_group(
        [list(range(P))], 0, "gloo", fault.queued, group_name="brief", timeout_s=DEADLINE_S
    )
    if fault.queued:
        return _broadcast_until_told(fault.act, guilty, P)
    if fault.act == "groups" and guilty:
        other = init_model_parallel_group([list(range(P))], 0, "gloo", group_name="other", timeout_s=DEADLINE_S)
    elif fault.act == "groups":
        init_model_parallel_group([list(range(P))], 0, "gloo", group_name="other", timeout_s=DEADLINE_S)
    if fault.checked:
        with check_collectives():
            return _told(
                _differing(fault.act, P, other if fault.act == "groups" else None)
                if guilty
                else lambda: program(_input(P))
            )
    if guilty:
        return _act(fault, program, P)
    if fault.when == "during":
        _store().wait(["acting"], timedelta(seconds=60))
    elif fault.when == "after":
        program(_input(P))
    story = _told(lambda: program(_input(P)))
    _store_quietly(f"told/{_group.rank_in_group}")
    return story


def _act(fault: Fault, program: Callable[[Tensor], Tensor], P: int) -> tuple[str, float]:
    """The culprit's part, where it is not a call that differs."""
    act = {
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "server": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
        "raise": lambda: None,
        "destroy": lambda: _group.destroy(),
        "late": lambda: _store().wait([f"told/{place}" for place in range(P - 1)], timedelta(seconds=60)),
    }[fault.act]
    if fault.when == "during":
        threading.Thread(target=_once_inside, args=(_thread.interrupt_main if fault.act == "raise" else act,)).start()
        try:
            return _told(lambda: program(_input(P)))
        except KeyboardInterrupt:
            return "KeyboardInterrupt", 0.0
    if fault.when == "after":
        program(_input(P))
    act()
    if fault.act == "late":
        return _told(lambda: program(_input(P)))
    if fault.act == "destroy":
        _store().wait([f"told/{place}" for place in range(P - 1)], timedelta(seconds=60))
    return "", 0.0


def _broadcast_until_told(act: str, guilty: bool, P: int) -> tuple[str, float]:
    """Objects over the group's queue without end: the fault must end them."""

    def without_end() -> None:
        while True:
            _group.broadcast_object("an object")

    _group.broadcast_object("an object")
    if guilty and act == "unread":
        _store().wait([f"told/{place}" for place in range(P - 1)], timedelta(seconds=60))
    elif guilty:
        if act == "writer":
            # Others are waiting by then: the second object takes them to the wait for the third.
            _group.broadcast_object("an object")
            _store().wait([f"waits/{place}" for place in range(1, P)], timedelta(seconds=60))
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        _group.broadcast_object("an object")
        _store().set(f"waits/{_group.rank_in_group}", "")
    story = _told(without_end)
    _store_quietly(f"told/{_group.rank_in_group}")
    return story


def _once_inside(act: Callable[[], None]) -> None:
    """Act when the main thread has been in a collective for a moment."""
    from fvops.debug.journal import running

    wait_until(lambda: any(time.monotonic() - entry.began > 0.3 for entry in running().values()))
    _store().set("acting", "")
    act()


def _differing(act: str, P: int, other: Any) -> Callable[[], Any]:
    x = _input(P)
    return {
        "shapes": lambda: _group.all_to_all_4D(torch.ones(1, 3, P, 2), 2, 1),
        "dtypes": lambda: _group.all_to_all_4D(x.double(), 2, 1),
        "ops": lambda: _group.all_reduce(x),
        "order": lambda: _group.all_to_all_4D(_group.all_gather(x, 1), 2, 1),
        "groups": lambda: other and other.all_to_all_4D(x, 2, 1),
    }[act]


def _without_room(guilty: bool, P: int) -> None:
    from fvops.parallel_state import init_model_parallel_group

    original = os.posix_fallocate

    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if guilty:
        os.posix_fallocate = refuse
    try:
        init_model_parallel_group([list(range(P))], 0, "gloo", group_name="brief", timeout_s=DEADLINE_S)
    finally:
        os.posix_fallocate = original


def _told(call: Callable[[], Any]) -> tuple[str, float]:
    start = time.monotonic()
    try:
        call()
    except RuntimeError as error:
        # Not the error itself: its traceback would hold on to tensors and groups.
        return str(error), time.monotonic() - start
    return "NOT TOLD", time.monotonic() - start


def _store() -> Any:
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()


def _store_quietly(key: str) -> None:
    """Set `key`; where the store's server is the victim there is nobody to tell."""
    try:
        _store().set(key, "")
    except RuntimeError:
        return


def _end_the_stopped(rank: int, P: int) -> None:
    """Once all others were told, rank 0 ends the stopped culprit, which can never go on."""
    if rank == 0:
        _store().wait([f"told/{place}" for place in range(P - 1)], timedelta(seconds=60))
        os.kill(int(_store().get(f"pid/{P - 1}")), signal.SIGKILL)


def _start_over(fault: Fault, rank: int, P: int, culprit: int) -> float:
    """Initialize again, all ranks that are left; the sum of as many ones."""
    import fvops

    before = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE")}
    if fault.dies:
        os.environ.update(RANK=str(rank - (rank > culprit)), WORLD_SIZE=str(P - 1))
    try:
        harness.init_fvops(suffix="again")
        total: float = fvops.get_sp_group().all_reduce(torch.ones(1)).item()
        fvops.get_world_group().barrier()
        fvops.cleanup_dist_env_and_memory()
        return total
    finally:
        os.environ.update(before)
