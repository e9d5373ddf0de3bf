"""A soak: mixed work for minutes, and memory, descriptors, threads and segments that must be flat at the end.

``python -m tools.soak``; ``FVOPS_SOAK_S`` seconds (default 600), ``--ranks`` ranks on this machine. Each round makes a
group, runs collectives of random shapes, objects, a compiled step with its gradient, and destroys the group. Every rank
takes samples after rounds; the first third of the time is warm-up. Exit code 1 when anything grew.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from typing import Any

import torch
from torch import Tensor

__all__ = ["main"]

# What may differ between the middle and the end of a soak: allocators round up, and hold back.
_RSS_GROWTH_MB = 16.0
_WARM_UP = 1 / 3


def main() -> int:
    """Run the ranks; print each one's figures; 0 if all are flat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    seconds = float(os.environ.get("FVOPS_SOAK_S", "600"))
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="fvops-soak-") as folder:
        processes = [
            context.Process(target=_rank, args=(rank, arguments.ranks, seconds, folder))
            for rank in range(arguments.ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    codes = [process.exitcode for process in processes]
    print(f"== soak of {seconds:g} s on {arguments.ranks} ranks: {'flat' if not any(codes) else f'exit codes {codes}'}")
    return 1 if any(codes) else 0


def _rank(rank: int, P: int, seconds: float, folder: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(P), TORCHINDUCTOR_CACHE_DIR=f"{folder}/cache{rank}"
    )
    torch.set_num_threads(1)
    import fvops

    fvops.maybe_init_distributed_environment_and_model_parallel(1, P, distributed_init_method=f"file://{folder}/store")
    step = torch.compile(_step, fullgraph=True)
    samples: list[dict[str, float]] = []
    start, rounds = time.monotonic(), 0
    # All leave after the same round: rank 0's clock decides.
    while fvops.get_world_group().broadcast_object(time.monotonic() - start < seconds):
        _round(random.Random(rounds), step, rounds)
        rounds += 1
        if rounds % 5 == 0:
            gc.collect()
            samples.append(_figures() | {"at": time.monotonic() - start})
    fvops.cleanup_dist_env_and_memory()
    grown = _report(rank, rounds, samples, seconds)
    sys.exit(1 if grown else 0)


def _step(group: Any, x: Tensor) -> Tensor:
    y = group.all_to_all_4D(x * 2, 2, 1)
    return group.all_gather(group.all_to_all_4D(y.relu(), 1, 2), 1)


def _round(draw: random.Random, step: Any, number: int) -> None:
    from fvops.parallel_state import get_world_group, init_model_parallel_group

    P = get_world_group().world_size
    group = init_model_parallel_group(
        [list(range(P))], 0, "gloo", use_message_queue_broadcaster=number % 2 == 1, group_name="soak"
    )
    for _ in range(8):
        S, H, D = draw.randint(1, 64), P * draw.randint(1, 4), draw.randint(1, 64)
        x = torch.ones(1, S, H, D, dtype=draw.choice([torch.float32, torch.bfloat16]))
        group.all_reduce(x)
        group.all_gather(x, draw.randrange(4))
        group.reduce_scatter(x, dim=2)
        group.broadcast(x, draw.randrange(P))
        group.gather(x, draw.randrange(P), 1)
        group.send(x)
        group.recv(x.shape, x.dtype)
        group.all_to_all_4D_coalesced([x, x, x])
    group.broadcast_object({"round": number, "list": [1, 2.0, "three"]})
    group.broadcast_tensor_dict({"a": torch.ones(draw.randint(1, 1000)), "b": number})
    group.send_object(["x" * draw.randint(0, 10_000)], (group.rank_in_group + 1) % P)
    group.recv_object((group.rank_in_group - 1) % P)
    x = torch.ones(1, 8, 2 * P, 16, requires_grad=True)
    for _ in range(4):
        step(group, x).sum().backward()
    x.grad = None
    group.barrier()
    group.destroy()


def _figures() -> dict[str, float]:
    """What this process holds now."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    with open("/proc/self/maps") as file:
        segments = sum("/dev/shm/#" in line for line in file)
    return {
        "MB": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "descriptors": float(len(os.listdir("/proc/self/fd"))),
        "threads": float(len(os.listdir("/proc/self/task"))),
        "Python threads": float(threading.active_count()),
        "segments": float(segments),
    }


def _report(rank: int, rounds: int, samples: list[dict[str, float]], seconds: float) -> bool:
    """Print the figures after the warm-up and at the end; whether something has grown."""
    warm = [sample for sample in samples if sample["at"] > _WARM_UP * seconds]
    if len(warm) < 4:
        print(f"rank {rank}: {rounds} rounds in {seconds:g} s are too few to tell")
        return True
    quarter = max(1, len(warm) // 4)
    grown, parts = False, []
    for name in (name for name in warm[0] if name != "at"):
        first, last = (statistics.median(sample[name] for sample in part) for part in (warm[:quarter], warm[-quarter:]))
        grown = grown or last - first > (_RSS_GROWTH_MB if name == "MB" else 0.0)
        parts.append(f"{name} {first:.0f} -> {last:.0f}")
    print(
        f"rank {rank}: {rounds} rounds, {len(samples)} samples, after warm-up -> at the end: {', '.join(parts)}",
        flush=True,
    )
    return grown


if __name__ == "__main__":
    sys.exit(main())
