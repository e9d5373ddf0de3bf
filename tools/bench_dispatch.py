"""What one call of a collective costs beside moving the data, in microseconds. Run it with `make bench`.

One process, one thread, 16 float32 (``[1, 2, 2, 4]`` for the 4D exchange), and nothing is sent: fvops' rows run its
whole path (dispatcher, registry, checks, recorder, allocation, packing) over a transport whose methods return at once.
Rows marked "fake pg" go through torch.distributed's "fake" backend; compare those with each other. Only the forward
call is timed, also where the input requires a gradient.

How to read it: times are the thread's CPU time: waiting for a busy core is left out. Every candidate runs in every
round, in an order shuffled anew. A row shows the median and the fastest of its rounds, and the medians of the rounds'
own ratios: to the *bare op* (`torch.library.Library` and one ``empty_like``: the least that a Python op costs) and to
the bare op that does the *same tensor work*. Under "input requires grad" a bare op stands inside the smallest
autograd.Function; inference_mode skips the Autograd kernel. The exit code is 0 whether the goals are met or not.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as funcol
from torch.testing._internal.distributed.fake_pg import FakeStore

from fvops.device_communicators.flat_transport import FlatTransport
from fvops.group_coordinator import GroupCoordinator
from fvops.kernels import layout
from fvops.registry import resolve

P = 2
WARM_UP = 2  # rounds
BARE = "bare op: empty_like"
SAME_ALL_REDUCE, SAME_ALL_GATHER, SAME_4D = "bare op: clone", "bare op: all_gather's work", "bare op: 4D's work"
LIBRARY = torch.library.Library("fvops_bench", "DEF")
SCHEMA = "(Tensor x, int world_size, str group_name) -> Tensor"
FVOPS, FVOPS_FAKE_PG = "fvops.all_reduce", "fvops.all_reduce (fake pg)"
FUNCOL = "funcol.all_reduce, wait (fake pg)"


@dataclass(frozen=True)
class Candidate:
    """One row: a call with one tensor, and the row of the bare op that does the same tensor work."""

    call: Callable[[Tensor], Any]
    same_work: str | None = None
    input_4D: bool = False
    differentiable: bool = True
    call_with_grad: Callable[[Tensor], Any] | None = None  # default: `call`


@dataclass(frozen=True)
class Result:
    """Microseconds a call, and the medians of the rounds' ratios."""

    candidate: str
    median_us: float
    min_us: float
    to_bare: float | None
    to_same_work: float | None


REQUIRES_GRAD = "input requires grad"
SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "grad mode, input does not require grad": torch.enable_grad,
    REQUIRES_GRAD: torch.enable_grad,
    "inference_mode": torch.inference_mode,
}


class NoTransport(FlatTransport):
    """Packs and allocates as every transport of flat buffers, and sends nothing."""

    name, device, world_size = "none", torch.device("cpu"), P

    def _all_to_all(self, recvs: Sequence[Tensor], sends: Sequence[Tensor]) -> None: ...

    def _all_gather(self, recv: Tensor, send: Tensor) -> None: ...

    def all_reduce(self, output: Tensor, input_: Tensor, reduce_op: str) -> None: ...


def make_group(transport: Any = None) -> GroupCoordinator:
    """A group over the fake world. As `from_process_group`, but with no gloo group: one process cannot make that."""
    world = dist.distributed_c10d._get_default_group()
    os.environ["FVOPS_TRANSPORT"] = "process_group"
    group = GroupCoordinator.__new__(GroupCoordinator)
    group.timeout_s = 60.0
    group._setup(0, world, world, True, "bench", torch.device("cpu"), [])
    if transport is not None:
        resolve(group.unique_name, P).transport = transport
    return group


def bare_candidate(name: str, work: Callable[[Tensor], Tensor], input_4D: bool = False) -> Candidate:
    """An op whose only kernel does `work`, and for inputs that require a gradient the smallest Function around it."""
    LIBRARY.define(f"{name}{SCHEMA}")
    LIBRARY.impl(name, lambda x, world_size, group_name: work(x), "CompositeExplicitAutograd")
    op = getattr(torch.ops.fvops_bench, name).default

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return op(x, P, "bench:0")

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    return Candidate(lambda x: op(x, P, "bench:0"), input_4D=input_4D, call_with_grad=lambda x: Bare.apply(x))


def bare_candidates() -> dict[str, Candidate]:
    return {
        BARE: bare_candidate("bare_empty_like", torch.empty_like),
        SAME_ALL_REDUCE: bare_candidate("bare_all_reduce", torch.clone),
        SAME_ALL_GATHER: bare_candidate("bare_all_gather", all_gather_work),
        SAME_4D: bare_candidate("bare_4D", all_to_all_4D_work, input_4D=True),
    }


def all_gather_work(x: Tensor) -> Tensor:
    """What a gather along dim 0 does to tensors beside the exchange: the output, and where its parts lie."""
    output = x.new_empty((P * x.size(0), *x.shape[1:]))
    layout.receive_buffer(layout.chunks_by_rank(output, 0, P))
    return output


def all_to_all_4D_work(x: Tensor) -> Tensor:
    """The same for the 4D exchange in mode (2, 1) at B=1."""
    B, S, H, D = x.shape
    layout.heads_by_rank(x, P).contiguous()
    output = x.new_empty((B, S * P, H // P, D))
    layout.receive_buffer(layout.sequence_by_rank(output, P))
    return output


def fvops_candidates() -> dict[str, Candidate]:
    group, fake_pg_group = make_group(NoTransport()), make_group()
    name, fake_pg_name = group.unique_name, fake_pg_group.unique_name
    ops = torch.ops.fvops
    all_reduce, all_gather, all_to_all_4D = ops.all_reduce.default, ops.all_gather.default, ops.all_to_all_4D.default
    return {
        FVOPS: Candidate(lambda x: all_reduce(x, "sum", P, name), SAME_ALL_REDUCE),
        "fvops.all_gather": Candidate(lambda x: all_gather(x, 0, P, name), SAME_ALL_GATHER),
        "fvops.all_to_all_4D": Candidate(lambda x: all_to_all_4D(x, 2, 1, P, name), SAME_4D, input_4D=True),
        "GroupCoordinator.all_reduce": Candidate(group.all_reduce, SAME_ALL_REDUCE),
        FVOPS_FAKE_PG: Candidate(lambda x: all_reduce(x, "sum", P, fake_pg_name), SAME_ALL_REDUCE),
    }


def registered_candidates() -> dict[str, Candidate]:
    """The ways that torch.library offers to define a differentiable op."""

    def clone(x: Tensor, world_size: int, group_name: str) -> Tensor:
        return x.clone()

    LIBRARY.define(f"registered_all_reduce{SCHEMA}")
    LIBRARY.impl("registered_all_reduce", clone, "CompositeExplicitAutograd")
    torch.library.register_autograd("fvops_bench::registered_all_reduce", lambda ctx, grad: (grad, None, None))
    registered = torch.ops.fvops_bench.registered_all_reduce.default
    custom = torch.library.custom_op("fvops_bench::custom_all_reduce", clone, mutates_args=(), schema=SCHEMA)
    custom.register_autograd(lambda ctx, grad: (grad, None, None))
    return {
        "Library op + register_autograd": Candidate(lambda x: registered(x, P, "bench:0"), SAME_ALL_REDUCE),
        "torch.library.custom_op": Candidate(lambda x: custom(x, P, "bench:0"), SAME_ALL_REDUCE),
    }


def torch_candidates() -> dict[str, Candidate]:
    """torch's own collectives; a functional one is complete only once it is waited for."""
    world, recv = dist.distributed_c10d._get_default_group(), torch.empty(16)
    name = world.group_name
    all_reduce, wait = torch.ops._c10d_functional.all_reduce.default, torch.ops._c10d_functional.wait_tensor.default
    return {
        FUNCOL: Candidate(lambda x: funcol.all_reduce(x, "sum", world).wait(), SAME_ALL_REDUCE),
        "funcol's ops alone (fake pg)": Candidate(lambda x: wait(all_reduce(x, "sum", name)), SAME_ALL_REDUCE),
        "dist.all_reduce, in place (fake pg)": Candidate(dist.all_reduce, differentiable=False),
        "dist.all_to_all_single (fake pg)": Candidate(lambda x: dist.all_to_all_single(recv, x), differentiable=False),
    }


def measure(candidates: dict[str, Candidate], setting: str, rounds: int, calls: int) -> list[Result]:
    requires_grad = setting == REQUIRES_GRAD
    x, x_BSHD = (torch.randn(shape, requires_grad=requires_grad) for shape in ((16,), (1, 2, 2, 4)))
    rows = {name: row for name, row in candidates.items() if row.differentiable or not requires_grad}
    times: dict[str, list[float]] = {name: [] for name in rows}
    order, shuffle = list(rows), random.Random(0).shuffle
    gc.disable()  # as timeit does; what a round leaves is collected between rounds
    with SETTINGS[setting]():
        for _round in range(WARM_UP + rounds):
            shuffle(order)
            gc.collect()
            for name in order:
                row = rows[name]
                call = row.call_with_grad if row.call_with_grad and requires_grad else row.call
                input_, start = x_BSHD if row.input_4D else x, time.thread_time()
                for _ in range(calls):
                    call(input_)
                times[name].append((time.thread_time() - start) / calls * 1e6)
    gc.enable()
    times = {name: rounds_us[WARM_UP:] for name, rounds_us in times.items()}

    def ratio(name: str, base: str | None) -> float | None:
        return None if base is None else median(a / b for a, b in zip(times[name], times[base], strict=True))

    return [
        Result(name, median(times[name]), min(times[name]), ratio(name, BARE), ratio(name, row.same_work))
        for name, row in rows.items()
    ]


def print_section(setting: str, results: list[Result]) -> None:
    print(f"\n{setting:<42} {'median us':>9} {'min us':>8} {'/ bare op':>10} {'/ same work':>12}")
    for row in results:
        to_bare, to_same_work = ("" if x is None else f"{x:.2f}" for x in (row.to_bare, row.to_same_work))
        print(f"  {row.candidate:<40} {row.median_us:9.2f} {row.min_us:8.2f} {to_bare:>10} {to_same_work:>12}")


def print_goals(setting: str, results: list[Result]) -> None:
    row = {result.candidate: result for result in results}
    fvops, funcol_us = row[FVOPS], row[FUNCOL].median_us
    below, below_fake_pg = funcol_us / fvops.median_us, funcol_us / row[FVOPS_FAKE_PG].median_us
    to_bare, same_work = fvops.to_bare or 0.0, fvops.to_same_work or 0.0
    print(f"\ngoals, {setting}: fvops.all_reduce is")
    for met, goal, ratio in (
        (to_bare <= 2, "within 2x of the bare op", to_bare),
        (same_work <= 2, "within 2x of the bare op with the same tensor work", same_work),
        (below >= 3, "at least 3x below funcol", below),
        (below_fake_pg >= 3, "at least 3x below funcol, both over the fake pg", below_fake_pg),
    ):
        print(f"  {'met' if met else 'MISSED':<7} {goal}: {ratio:.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time one call of a collective that sends nothing.")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=40, help="calls of each candidate in a round")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=P)
    candidates = {**bare_candidates(), **fvops_candidates(), **registered_candidates(), **torch_candidates()}
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    machine = {"torch": torch.__version__, "python": platform.python_version(), "cpu": cpu[1] if cpu else "unknown"}
    print(f"{machine}, {arguments.rounds} rounds of {arguments.calls} calls")
    sections = {}
    for setting in SETTINGS:
        sections[setting] = measure(candidates, setting, arguments.rounds, arguments.calls)
        print_section(setting, sections[setting])
    for setting, results in sections.items():
        print_goals(setting, results)
    if arguments.json:
        settings = {name: [asdict(result) for result in results] for name, results in sections.items()}
        report = {**machine, "rounds": arguments.rounds, "calls": arguments.calls, "settings": settings}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
