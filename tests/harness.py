"""Tests over real processes: n ranks on this machine that serve one test after another.

`Ranks(n).run(function, *args)` calls ``function(*args)`` on every rank and returns the ranks' results. The function is
a module's top-level function; arguments and results are what `torch.save` takes. Workers are started once per world
size, forked from a server that has imported torch (`preloaded`), and hold an initialized fvops with one
sequence-parallel group over all ranks.

Every run has a deadline. When it passes, every rank's Python stacks, `fvops.debug.dump` and log are printed and all are
killed. An error of
any rank is raised with its own traceback. After either, the next run gets new processes.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import importlib
import io
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

__all__ = ["RankFailure", "Ranks", "start_beside"]

# Once one rank has failed, how long the others get to report too.
_GRACE_S = 5.0
_STACKS_S = 3.0
# For the workers to have imported torch and fvops.
_START_S = 300.0


class RankFailure(AssertionError):
    """A rank raised, died, or was not done at the deadline; the text holds every rank's story."""


class Ranks:
    """The workers of one world size; `Ranks.get(n)` shares them between tests."""

    _pools: dict[tuple[int, str], Ranks] = {}  # noqa: RUF012  (one registry for the test process)

    def __init__(self, world_size: int, transport: str) -> None:
        self.world_size = world_size
        self.transport = transport
        self._start()

    def _start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=f"fvops-ranks{self.world_size}-"))
        self._jobs = 0
        self._killed = False
        context = _context(self.transport)
        variables = _variables(self.transport)
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(self.world_size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world_size, str(self._folder), there, variables), daemon=True
            )
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)
        # Starting up is no test's time: importing torch takes seconds, on a busy machine many.
        self._collect("start of the workers", _START_S)

    @classmethod
    def get(cls, world_size: int, transport: str | None = None) -> Ranks:
        """The shared workers, started at first use.

        Args:
            transport: a value of ``FVOPS_TRANSPORT``; "nccl" and "hccl" are the doubles. Default: that of
                ``FVOPS_TEST_TRANSPORT``, under which the whole suite can be run, else "auto". These see no GPU;
                "gpu-nccl" (real NCCL, one rank), "gpu-gloo" and "gpu-symm" (all ranks on the first GPU) do.
        """
        key = (world_size, transport or os.environ.get("FVOPS_TEST_TRANSPORT") or "auto")
        if key not in cls._pools:
            cls._pools[key] = cls(*key)
        return cls._pools[key]

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        deadline_s: float = 120.0,
        initialize: bool = True,
        cache: str | None = None,
        grace_s: float = _GRACE_S,
    ) -> list[Any]:
        """Call ``function(*args)`` on every rank; the results in rank order.

        Args:
            deadline_s: seconds until all ranks are killed.
            initialize: have fvops initialized (sp = world size); otherwise it is torn down first.
            cache: compile cache folder shared by the ranks; default a fresh one, removed afterwards.
            grace_s: how long the other ranks may go on once one has failed.
        """
        if self._killed:
            self._start()
        self._jobs += 1
        folder = cache or tempfile.mkdtemp(prefix="cache-", dir=self._folder)
        job = (function.__module__, function.__qualname__, args, initialize, folder, self._jobs)
        message = _dump(job)
        try:
            self._send(message)
            return self._collect(function.__qualname__, deadline_s, grace_s)
        finally:
            if cache is None:
                shutil.rmtree(folder, ignore_errors=True)

    def _send(self, message: bytes) -> None:
        try:
            for connection in self._connections:
                connection.send_bytes(message)
        except OSError:
            codes = [process.exitcode for process in self._processes]
            self.kill()
            raise RankFailure(f"a worker died between two runs; exit codes {codes}") from None

    def _collect(self, name: str, deadline_s: float, grace_s: float = _GRACE_S) -> list[Any]:
        replies: dict[int, tuple[str, Any]] = {}
        until = time.monotonic() + deadline_s
        while len(replies) < self.world_size:
            waiting = {self._connections[rank]: rank for rank in range(self.world_size) if rank not in replies}
            ready = wait(list(waiting), timeout=max(0.0, until - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]
                try:
                    replies[rank] = _load(connection.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    self._processes[rank].join(5)
                    replies[rank] = ("died", f"exit code {self._processes[rank].exitcode}")
                if replies[rank][0] != "ok":
                    until = min(until, time.monotonic() + grace_s)
        if len(replies) == self.world_size and all(kind == "ok" for kind, _ in replies.values()):
            return [replies[rank][1] for rank in range(self.world_size)]
        failed = any(kind != "ok" for kind, _ in replies.values())
        what = "failed" if failed else f"was not done after {deadline_s:g} s"
        text = f"{name} on {self.world_size} ranks {what}\n{self._stories(replies)}"
        self.kill()
        raise RankFailure(text)

    def _stories(self, replies: dict[int, tuple[str, Any]]) -> str:
        silent = [rank for rank in range(self.world_size) if rank not in replies]
        for rank in silent:
            os.kill(self._processes[rank].pid, signal.SIGUSR2)  # fvops' answer: the stacks and its dump
        # One after the other: faulthandler drops a signal that comes while it answers another.
        mute = self._wait_for_log(silent, "end of dump")
        for rank in mute:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)  # it holds the GIL: faulthandler alone writes its stacks
        self._wait_for_log(mute, "most recent call first")
        parts = []
        for rank in range(self.world_size):
            kind, value = replies.get(rank, ("no answer", "see its stacks in the log"))
            parts.append(f"--- rank {rank}: {kind}\n{'' if kind == 'ok' else value}")
            log = (self._folder / f"rank{rank}.log").read_text(errors="replace")
            if kind != "ok" and log.strip():
                parts.append(f"--- rank {rank}'s log\n{log[-6000:]}")
        return "\n".join(parts)

    def _wait_for_log(self, ranks: list[int], text: str) -> list[int]:
        """Wait, for a while, until the ranks' logs hold `text`; the ranks whose logs do not."""
        until = time.monotonic() + _STACKS_S
        while True:
            logs = {rank: self._folder / f"rank{rank}.log" for rank in ranks}
            ranks = [rank for rank, log in logs.items() if text not in log.read_text(errors="replace")]
            if not ranks or time.monotonic() > until:
                return ranks
            wait([process.sentinel for process in self._processes], timeout=0.05)

    def kill(self) -> None:
        """End the workers now and remove their folder; the next run starts new ones."""
        self._killed = True
        for process in self._processes:
            if process.is_alive():
                process.kill()
        for process in self._processes:
            process.join()
        shutil.rmtree(self._folder, ignore_errors=True)


@atexit.register
def _kill_all() -> None:
    for pool in list(Ranks._pools.values()):
        pool.kill()


def _context(transport: str) -> Any:
    """How workers are started: afresh where they use a GPU, which may not be looked at before a fork."""
    if transport.startswith("gpu-"):
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    # Its importing torch asks how many GPUs there are; afterwards no child could be told that there are none.
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
    return context


def start_beside(function: Callable[..., None], *args: Any) -> Any:
    """A process that runs ``function(*args)``, forked as the workers are; the caller ends and joins it."""
    process = _context("shm").Process(target=function, args=args, daemon=True)
    process.start()
    return process


def _variables(transport: str) -> dict[str, str]:
    """The environment of workers that use `transport`."""
    if transport == "gpu-nccl":
        return {"FVOPS_TRANSPORT": "nccl", "LOCAL_RANK": "0"}
    if transport == "gpu-gloo":
        return {"FVOPS_TRANSPORT": "process_group", "LOCAL_RANK": "0", "FVOPS_TEST_BACKEND": "gloo"}
    if transport == "gpu-symm":
        shared = {"LOCAL_RANK": "0", "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
        return {"FVOPS_TRANSPORT": "symm", "FVOPS_TEST_BACKEND": "gloo", **shared}
    variables = {"FVOPS_TRANSPORT": transport, "CUDA_VISIBLE_DEVICES": ""}
    if transport in ("nccl", "hccl"):
        from tests.doubles.build import build

        variables[f"FVOPS_{transport.upper()}_LIBRARY"] = build(f"{transport}_double")
    return variables


def _dump(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _load(data: bytes) -> Any:
    # Our own processes on a pipe: no stranger's bytes.
    return torch.load(io.BytesIO(data), weights_only=False)


def _serve(rank: int, world_size: int, folder: str, connection: Connection, variables: dict[str, str]) -> None:
    """A worker's life: read a job, run it, answer."""
    log = open(os.path.join(folder, f"rank{rank}.log"), "w", buffering=1)  # noqa: SIM115  (open for life)
    os.dup2(log.fileno(), sys.stdout.fileno())
    os.dup2(log.fileno(), sys.stderr.fileno())
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(variables)
    # No test waits for it. Long, since a rank that is starved of processor time may compile for minutes; a hang is
    # ended by the run's own deadline, with every rank's stacks.
    os.environ.setdefault("FVOPS_TIMEOUT_S", "300")
    torch.set_num_threads(1)
    from fvops.debug import install_signal_handler

    if "CUDA_VISIBLE_DEVICES" in variables:  # inherited; without a fork it takes long, and few GPU tests need it
        from tests import preloaded  # noqa: F401

    install_signal_handler(signal.SIGUSR2)

    connection.send_bytes(_dump(("ok", None)))
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            reply = ("ok", _run_job(folder, *_load(message)))
        except BaseException:  # whatever it was, the parent shows it
            reply = ("raised", traceback.format_exc())
        try:
            connection.send_bytes(_dump(reply))
        except Exception:  # torch.save can fail in any way on what a test returns; the parent shows how
            connection.send_bytes(_dump(("cannot be sent back", traceback.format_exc())))


def _run_job(
    folder: str, module: str, name: str, args: tuple[Any, ...], initialize: bool, cache: str, number: int
) -> Any:
    import fvops
    from fvops import parallel_state

    torch._dynamo.reset()
    function = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    os.environ["FVOPS_TEST_INIT"] = f"file://{folder}/store{number}"
    if not initialize:
        fvops.cleanup_dist_env_and_memory()
    elif not parallel_state.model_parallel_is_initialized():
        init_fvops()
    with compile_cache(cache):
        return function(*args)


def init_fvops(tp_size: int = 1, sp_size: int | None = None, suffix: str = "") -> None:
    """Initialize fvops in a worker, over a store of its own (`suffix` tells several in one job apart)."""
    import fvops

    world_size, store = int(os.environ["WORLD_SIZE"]), os.environ["FVOPS_TEST_INIT"] + suffix
    sp_size = world_size if sp_size is None else sp_size
    backend = os.environ.get("FVOPS_TEST_BACKEND")
    if backend is None:
        fvops.maybe_init_distributed_environment_and_model_parallel(tp_size, sp_size, distributed_init_method=store)
        return
    device = fvops.get_local_torch_device()
    place = {"world_size": world_size, "rank": int(os.environ["RANK"]), "local_rank": 0}
    fvops.init_distributed_environment(**place, distributed_init_method=store, backend=backend, device_id=device)
    fvops.initialize_model_parallel(tp_size, sp_size, backend=backend)


@contextlib.contextmanager
def compile_cache(folder: str) -> Iterator[None]:
    """A context in which compiled artifacts are looked for and left in `folder` only, and none are in memory."""
    inductor = sys.modules.get("torch._inductor.utils")
    if inductor is not None:
        inductor.clear_caches()
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        else:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
