"""``python -m fvops.doctor``: is everything that fvops needs here, and does an exchange work?

It looks at this machine, makes the groups and exchanges tensors for about a second: between two processes that it
starts here, or under torchrun between all ranks: ``torchrun --nproc-per-node 4 -m fvops.doctor``. Exit code 0 only if
all is well.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from fvops import envs, parallel_state
from fvops._version import __version__
from fvops.device_communicators.library_loading import LibraryNotFoundError
from fvops.platforms import default_backend, local_torch_device

__all__ = ["Report", "examine_exchange", "examine_here", "examine_machine", "main"]

_TORCH_SINCE = (2, 11)
_SHM_WANTED = 256 << 20
_SECONDS = 1.0
# Of the exchange between processes started here: how many, how long each waits for the other, and all together.
_PROCESSES, _WAIT_S, _ALL_S = 2, 30.0, 120.0
_OK, _WRONG = "ok  ", "!!  "
_SHAPE_S, _HEADS, _HEAD_SIZE = 512, 8, 128


@dataclass
class Report:
    """What was found, line by line, and whether anything is wrong."""

    lines: list[str] = field(default_factory=list)
    problems: int = 0

    def say(self, what: str, found: object, problem: str = "") -> None:
        """Add a line; `problem` says what is wrong with it and what would be right."""
        self.problems += bool(problem)
        self.lines.append(f"{_WRONG if problem else _OK}{what:<22} {found}{f'  <- {problem}' if problem else ''}")


def examine_machine(report: Report) -> None:
    """Versions, devices, room in shared memory, libraries."""
    report.say("fvops, Python", f"{__version__}, {platform.python_version()} on {platform.machine()}")
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    wanted = ".".join(map(str, _TORCH_SINCE))
    report.say("torch", torch.__version__, "" if version >= _TORCH_SINCE else f"needs {wanted} or later")
    report.say("triton", _version("triton"))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            report.say(f"cuda:{index}", torch.cuda.get_device_name(index))
    else:
        report.say("accelerator", f"none that torch sees; tensors on {local_torch_device(0)}")
    _examine_shared_memory(report)
    report.say("backend", f"{default_backend()} for the groups' tensors, gloo for the rest")
    report.say("FVOPS_TRANSPORT", envs.FVOPS_TRANSPORT)
    needed = torch.cuda.is_available() or envs.FVOPS_TRANSPORT == "nccl"
    _examine_library(report, "NCCL", _load_nccl, needed)
    _examine_library(report, "HCCL", _load_hccl, envs.FVOPS_TRANSPORT == "hccl" or default_backend() == "hccl")


def examine_exchange(report: Report) -> None:
    """The groups, their transports, and an exchange whose values are checked. Collective over torchrun's ranks."""
    world = envs.WORLD_SIZE
    started = not parallel_state.model_parallel_is_initialized()
    if started:
        parallel_state.maybe_init_distributed_environment_and_model_parallel(1, world)
    group = parallel_state.get_sp_group()
    for one in (
        group,
        parallel_state.get_world_group(),
        parallel_state.get_node_group(),
        parallel_state.get_tp_group(),
    ):
        communicator = one.device_communicator
        over = (
            "nothing to send"
            if communicator is None
            else f"{communicator.transport.name}: {communicator.why_transport}"
        )
        report.say(f"group {one.unique_name}", f"{one.world_size} on {one.device}; {over}")
    rank, P = group.rank_in_group, group.world_size
    x = torch.full((1, _SHAPE_S, _HEADS * P, _HEAD_SIZE), float(rank), device=group.device)
    y = group.all_to_all_4D(x)
    expected = torch.arange(float(P), device=group.device).repeat_interleave(_SHAPE_S)
    right = bool((y == expected.view(1, -1, 1, 1)).all())
    report.say(
        "exchange", "values are right" if right else "WRONG VALUES", "" if right else "do not use this transport"
    )
    # The number of rounds is agreed beforehand: ranks that stopped by their own clocks would part.
    start = time.perf_counter()
    group.all_to_all_4D(x)
    rounds = group.broadcast_object(max(3, min(10_000, int(_SECONDS / (time.perf_counter() - start)))))
    start = time.perf_counter()
    for _ in range(rounds):
        y = group.all_to_all_4D(x)
    if group.device.type != "cpu":
        getattr(torch, group.device.type).synchronize(group.device)
    seconds = (time.perf_counter() - start) / rounds
    megabytes = x.numel() * x.element_size() / 1e6
    report.say(
        "speed", f"{megabytes:.1f} MB a rank in {seconds * 1e3:.2f} ms: {megabytes / seconds / 1e3:.2f} GB/s a rank"
    )
    if started:
        parallel_state.cleanup_dist_env_and_memory()


def examine_here(report: Report) -> None:
    """`examine_exchange` between two processes that are started on this machine; None stays."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {
        **os.environ,
        "WORLD_SIZE": str(_PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "FVOPS_TIMEOUT_S": str(min(_WAIT_S, envs.FVOPS_TIMEOUT_S)),
    }
    if torch.cuda.is_available() and torch.cuda.device_count() < _PROCESSES:
        variables["CUDA_VISIBLE_DEVICES"] = ""
        report.say("exchange", f"on CPUs: {_PROCESSES} processes need a GPU each, and there is one")
    command = [sys.executable, "-m", "fvops.doctor", "--exchange-only"]
    processes = [
        subprocess.Popen(
            command,
            env={**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(_PROCESSES)
    ]
    until = time.monotonic() + _ALL_S
    try:
        for rank, process in enumerate(processes):
            _take_over(report, rank, process, until)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _take_over(report: Report, rank: int, process: subprocess.Popen[str], until: float) -> None:
    """Add to the report what that rank has found; rank 0 alone tells of what is well."""
    try:
        output, _ = process.communicate(timeout=max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        report.say("exchange", f"rank {rank} of {_PROCESSES} is not done", f"it was stopped after {_ALL_S:g} s")
        return
    lines = output.splitlines()
    wrong = [line for line in lines if line.startswith(_WRONG)]
    report.lines += [line for line in lines if line.startswith(_OK) and rank == 0] + wrong
    report.problems += len(wrong)
    if process.returncode and not wrong:
        said = lines[-1] if lines else "it said nothing"
        report.say("exchange", f"rank {rank} of {_PROCESSES} ended with exit code {process.returncode}", said)


def main(arguments: Sequence[str] = ()) -> int:
    """Print the report of this rank 0; the exit code of every rank says whether its own is well."""
    parser = argparse.ArgumentParser(prog="fvops.doctor", description=__doc__)
    parser.add_argument("--no-exchange", action="store_true", help="look at this machine only")
    parser.add_argument("--exchange-only", action="store_true", help="only what needs other ranks, which are there")
    options = parser.parse_args(arguments)
    report = Report()
    if not options.exchange_only:
        examine_machine(report)
    if options.no_exchange:
        report.say("exchange", "not tried, as asked")
    elif "RANK" in os.environ and envs.WORLD_SIZE > 1:
        try:
            examine_exchange(report)
        except (RuntimeError, ValueError) as error:
            report.say("exchange", f"failed on rank {envs.RANK}", str(error))
    else:
        examine_here(report)
    if options.exchange_only:
        print("\n".join(report.lines), flush=True)
    elif envs.RANK == 0 or report.problems:
        heading = f"fvops doctor, rank {envs.RANK} of {envs.WORLD_SIZE}"
        verdict = "all is well" if report.problems == 0 else f"{report.problems} problem(s), marked !!"
        print("\n".join([heading, *report.lines, verdict]), flush=True)
    return 1 if report.problems else 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _examine_shared_memory(report: Report) -> None:
    folder = "/dev/shm"
    if not os.path.isdir(folder):
        report.say(folder, "not there: CPU ranks exchange over gloo")
        return
    room = shutil.disk_usage(folder).free
    report.say(
        folder,
        f"{room / 1e9:.1f} GB free",
        "" if room >= _SHM_WANTED else "too little for exchanges of large tensors; in a container raise --shm-size",
    )


def _examine_library(report: Report, name: str, load: Callable[[], str], needed: bool) -> None:
    try:
        report.say(name, load())
    except LibraryNotFoundError as error:
        report.say(name, "not found" if needed else "not found (not needed here)", str(error) if needed else "")


def _load_nccl() -> str:
    from fvops.device_communicators.pynccl_wrapper import NCCLLibrary

    library = NCCLLibrary()
    return f"version {library.get_version()}, {library.path}"


def _load_hccl() -> str:
    from fvops.device_communicators.pyhccl_wrapper import HCCLLibrary

    return HCCLLibrary().path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
