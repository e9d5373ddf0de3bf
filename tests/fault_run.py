"""Carrying out one fault of `tests/fault_table.py`: what each rank does, and what the survivors write down."""

from __future__ import annotations

import _thread
import contextlib
import gc
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests import fault_programs, harness
from tests.fault_programs import DEADLINE_S, Programs
from tests.fault_queue import form_and_broadcast
from tests.fault_room import run_without_room
from tests.fault_table import FAULTS, Fault
from tests.remains import held
from tests.waiting import wait_until

__all__ = ["serve_store", "suffer"]

# For a rank to do its part, on a machine with more ranks than cores.
_PATIENCE = timedelta(seconds=60)


def serve_store(port: int) -> None:
    """A process that does nothing but hold a store's server, as torchrun's agent does. Until it is killed."""
    import torch.distributed as dist

    _server = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    threading.Event().wait()


def suffer(name: str, mode: str, folder: str, port: int, server: int) -> None:
    """Run the fault `name`; every rank that survives leaves a JSON file in `folder`.

    Args:
        port: where the store is: rank 0 serves it, unless `server` does.
        server: the pid of a process that does nothing else; 0 for none.
    """
    import fvops

    (fault,) = [fault for fault in FAULTS if fault.name == name]
    P, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    culprit = fault.culprit(P)
    before = held()
    with _rendezvous(port, server):
        harness.init_fvops(sp_size=1)
    _store().set(f"pid/{rank}", str(os.getpid()))
    programs = fault_programs.warm(fault, mode, P)
    error, seconds = "", 0.0
    try:
        error, seconds = _meet(fault, programs, rank == culprit, P, server)
    finally:
        if rank == 0 and fault.act != "server":
            _see_off(fault, P)
        fvops.cleanup_dist_env_and_memory()
    again = _start_over(fault, rank, P, culprit)
    gc.collect()
    with contextlib.suppress(AssertionError):  # the test shows what is held
        wait_until(lambda: held() == before, 5.0)  # threads end a moment after they are told to
    story = {"error": error, "seconds": seconds, "again": again, "held": [before, held()]}
    Path(folder, str(rank)).write_text(json.dumps(story))


@contextlib.contextmanager
def _rendezvous(port: int, server: int) -> Iterator[None]:
    """Inside, `init_fvops` meets the other ranks over TCP, as a program does: by address, or as torchrun's workers."""
    variables = {"FVOPS_TEST_INIT": f"tcp://127.0.0.1:{port}"}
    if server:
        variables = {"FVOPS_TEST_INIT": "env://", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        variables |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _meet(fault: Fault, programs: Programs, guilty: bool, P: int, server: int) -> tuple[str, float]:
    """What this rank was told, and after how many seconds."""
    from fvops.debug import check_collectives

    if fault.room:
        story = _told(lambda: run_without_room(fault, programs, guilty, P))
    elif fault.queued:
        story = _told(form_and_broadcast(fault, guilty, P, _store()))
    else:
        fault_programs.form(fault, DEADLINE_S)
        if fault.act == "store":
            return _told(lambda: _lose_the_store(programs, server))
        if guilty and not fault.checked:
            return _act(fault, programs, P)
        if fault.checked:
            with check_collectives():
                story = _told(programs.other if guilty else programs.right)
        else:
            if fault.when == "during":
                _await_the_act(fault, P)
            elif fault.when == "after":
                programs.right()
            if fault.act == "destroy":
                place = fault_programs.group.rank_in_group
                say = partial(_store().set, f"inside/{place}", "")
                threading.Thread(target=_once_inside, args=(say,)).start()
            story = _told(programs.right)
    with contextlib.suppress(RuntimeError):  # where the store's server is the victim there is nobody to tell
        _store().set(f"told/{os.environ['RANK']}", "")
    return story


def _act(fault: Fault, programs: Programs, P: int) -> tuple[str, float]:
    """The culprit's part, where it is not a call that differs."""
    others_are_told = [f"told/{place}" for place in range(P - 1)]
    act: Callable[[], Any] = {
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "server": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
        "raise": lambda: None,
        "destroy": lambda: fault_programs.group.destroy(),
        "late": lambda: _store().wait(others_are_told, _PATIENCE),
    }[fault.act]
    if fault.when == "during":
        return _act_inside(fault, act, programs)
    if fault.when == "after":
        programs.right()
    if fault.act == "destroy":
        _store().wait([f"inside/{place}" for place in range(P - 1)], _PATIENCE)
    act()
    if fault.act == "late":
        return _told(programs.right)
    if fault.act == "destroy":
        _store().wait(others_are_told, _PATIENCE)
    return "", 0.0


def _act_inside(fault: Fault, act: Callable[[], Any], programs: Programs) -> tuple[str, float]:
    """Act while the main thread is in a call. The others come to it afterwards: else it might end before."""
    acts = [lambda: _store().set("acting", ""), act]
    if fault.act == "raise":
        # Where the tests run in the background of a shell, interrupts are ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        acts = [_thread.interrupt_main, acts[0]]
    thread = threading.Thread(target=_once_inside, args=acts)
    thread.start()
    try:
        return _told(programs.right)
    except KeyboardInterrupt:
        thread.join()
        return "KeyboardInterrupt", 0.0


def _await_the_act(fault: Fault, P: int) -> None:
    """Wait until the culprit is interrupted, or its process stopped or dead."""
    _store().wait(["acting"], _PATIENCE)
    if fault.act == "raise":
        return
    pid = int(_store().get(f"pid/{fault.culprit(P)}"))

    def goes_on() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "TZX"
        except (FileNotFoundError, ProcessLookupError):
            return False

    wait_until(lambda: not goes_on())


def _once_inside(*acts: Callable[[], Any]) -> None:
    """Once the main thread has been in a call of the group for a moment: act."""
    from fvops.debug.journal import running

    def inside() -> bool:
        return any(
            entry.member.group == "brief:0" and time.monotonic() - entry.began > 0.3 for entry in running().values()
        )

    wait_until(inside)
    for act in acts:
        act()


def _lose_the_store(programs: Programs, server: int) -> None:
    """The store's server dies, and no rank. What needs no store goes on; what does raises."""
    import fvops

    fvops.get_world_group().barrier()
    if fvops.get_world_rank() == 0:
        os.kill(server, signal.SIGKILL)
    wait_until(_store_is_gone)
    y = programs.right()
    if not bool((y == 2).all()):
        raise ValueError(f"after the server's end, the program gives {y}")
    # So that no rank takes the next error for the end of another.
    fvops.get_world_group().barrier()
    fault_programs.form(FAULTS[0], DEADLINE_S)


def _store_is_gone() -> bool:
    try:
        _store().set("is there anybody", "")
    except RuntimeError:
        return True
    return False


def _told(call: Callable[[], Any]) -> tuple[str, float]:
    """The error that `call` raises, or the words that it returns, and after how many seconds."""
    start = time.monotonic()
    try:
        words = call()
    except RuntimeError as error:
        # Not the error itself: its traceback would hold on to tensors and groups.
        return str(error), time.monotonic() - start
    return words if isinstance(words, str) else "NOT TOLD", time.monotonic() - start


def _store() -> Any:
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()


def _see_off(fault: Fault, P: int) -> None:
    """Rank 0, which has the store, leaves once all others were told; a stopped one, which can never go on, it ends."""
    if fault.act == "store":
        return
    told = [f"told/{place}" for place in range(P) if place != fault.culprit(P) or fault.checked]
    _store().wait(told, _PATIENCE)
    if fault.act == "stop":
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
