"""What the shared-memory transport gains: each collective over it, over gloo, and as a plain copy, in turn in one run.

``python tools/bench_shm.py --ranks 2 4`` spawns its own ranks. Every round runs every candidate once, after a barrier;
a row shows the median of a rank's slowest-of-all times in ms, and the medians' ratios. "FastVideo's way" is its three
copies around `all_to_all_single`. The plain copy moves as many bytes as one rank's tensor holds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from fvops.device_communicators.shm import ShmTransport
from fvops.kernels import layout
from fvops.torch_compat import all_gather_flat, reduce_scatter_flat

SIZES_MB = {"64 KB": 0.0625, "0.1 MB": 0.1, "1.6 MB": 1.6, "25 MB": 25.0}
HEADS, HEAD_SIZE = 8, 64


def fastvideo_way(x: Tensor, P: int) -> Tensor:
    """Mode (2, 1): transpose into a contiguous buffer, exchange, and transpose twice more."""
    B, s, H, D = x.shape
    send = x.reshape(B, s, P, H // P, D).transpose(0, 2).contiguous()
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send)
    return received.reshape(P * s, B, H // P, D).transpose(0, 1).contiguous()


def shm_exchange(transport: ShmTransport, x: Tensor, P: int) -> Tensor:
    B, s, H, D = x.shape
    y = transport.empty((B, s * P, H // P, D), x.dtype)
    transport.exchange((layout.sequence_by_rank(y, P),), (layout.heads_by_rank(x, P),))
    return y


def shm_all_reduce(transport: ShmTransport, x: Tensor) -> Tensor:
    y = transport.empty(x.shape, x.dtype)
    transport.all_reduce(y, x, "sum")
    return y


def shm_all_gather(transport: ShmTransport, x: Tensor, P: int) -> Tensor:
    y = transport.empty((x.size(0) * P, *x.shape[1:]), x.dtype)
    transport.all_gather(layout.chunks_by_rank(y, 0, P), x)
    return y


def shm_reduce_scatter(transport: ShmTransport, x: Tensor, P: int) -> Tensor:
    y = transport.empty((x.size(0) // P, *x.shape[1:]), x.dtype)
    transport.reduce_scatter(y, layout.chunks_by_rank(x, 0, P), "sum")
    return y


def gloo_all_reduce(x: Tensor) -> Tensor:
    y = x.clone()
    dist.all_reduce(y)
    return y


def gloo_all_gather(x: Tensor, P: int) -> Tensor:
    y = x.new_empty((x.size(0) * P, *x.shape[1:]))
    all_gather_flat(y, x)
    return y


def gloo_reduce_scatter(x: Tensor, P: int) -> Tensor:
    y = x.new_empty((x.size(0) // P, *x.shape[1:]))
    reduce_scatter_flat(y, x)
    return y


def candidates(transport: ShmTransport, megabytes: float, P: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """By collective, the calls to compare."""
    rows = max(1, round(megabytes * 2**20 / (HEADS * HEAD_SIZE * 4)) // P) * P
    x = torch.randn(1, rows, HEADS, HEAD_SIZE)
    flat, target = torch.randn(rows, HEADS * HEAD_SIZE), torch.empty_like(x)
    copy = lambda: target.copy_(x)  # noqa: E731
    return {
        "all_to_all_4D": {
            "shm": lambda: shm_exchange(transport, x, P),
            "gloo": lambda: fastvideo_way(x, P),
            "copy": copy,
        },
        "all_reduce": {"shm": lambda: shm_all_reduce(transport, flat), "gloo": lambda: gloo_all_reduce(flat)},
        "all_gather": {"shm": lambda: shm_all_gather(transport, flat, P), "gloo": lambda: gloo_all_gather(flat, P)},
        "reduce_scatter": {
            "shm": lambda: shm_reduce_scatter(transport, flat, P),
            "gloo": lambda: gloo_reduce_scatter(flat, P),
        },
    }


def measure(calls: dict[str, Callable[[], Any]], rounds: int, inner: int) -> dict[str, float]:
    """Median seconds a call of the slowest rank, by candidate."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 3):
        for name, call in calls.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(inner):
                call()
            if number >= 3:
                times[name].append((time.perf_counter() - start) / inner)
    result = {}
    for name, values in times.items():
        slowest = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        result[name] = median(slowest.tolist())
    return result


def worker(rank: int, P: int, store: str, only: list[str], sizes: list[str], rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=P)
    transport, words = ShmTransport.create(dist.distributed_c10d._get_default_group(), "bench")
    if transport is None:
        raise SystemExit(words)
    if rank == 0:
        print(f"-- {P} ranks on {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {words}", flush=True)
    for size in sizes:
        for op, calls in candidates(transport, SIZES_MB[size], P).items():
            if only and op not in only:
                continue
            found = measure(calls, rounds, 20 if SIZES_MB[size] < 1 else 1)
            if rank == 0:
                copy = f"   shm / copy {found['shm'] / found['copy']:5.2f}" if "copy" in found else ""
                listed = "  ".join(f"{name} {seconds * 1e3:8.3f}" for name, seconds in found.items())
                print(
                    f"{size:>7} {op:15} ms: {listed}   gloo / shm {found['gloo'] / found['shm']:5.1f}{copy}", flush=True
                )
    dist.barrier()
    transport.close()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--ops", nargs="*", default=[])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES_MB), choices=list(SIZES_MB))
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    for P in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder:
            args = (P, f"{folder}/store", arguments.ops, arguments.sizes, arguments.rounds)
            mp.spawn(worker, args=args, nprocs=P)


if __name__ == "__main__":
    main()
