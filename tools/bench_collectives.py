"""What an exchange between CPU ranks costs, beside what else could be used, in one run. ``make bench`` runs it.

Every round runs every candidate a few times in a row, after a barrier; its time in a round is that of the slowest rank.
Shown are medians over the rounds and their ratios to fvops' median: above 1 is slower than fvops. The plain copy of the
same bytes is the floor: nothing that delivers a tensor can be faster than writing it once. "its copies alone" are the
strided copies of a one-pass exchange, without other ranks.

``--json FILE`` keeps everything, ``--plot FILE`` draws time over bytes (needs matplotlib).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tools.bench_candidates import FLOOR, STRIDED_FLOOR, candidates

SIZES = {
    "64 KB": 1 << 16,
    "0.1 MB": 100_000,
    "1.6 MB": 1_600_000,
    "6.3 MB": 6_300_000,
    "25 MB": 25_000_000,
    "100 MB": 100_000_000,
}
# Calls that follow one another after a barrier: enough that its skew between the ranks is a small part of the time.
_INNER_SMALL, _INNER_LARGE = 50, 5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def measure(calls: dict[str, Callable[[], Any]], rounds: int, inner: int) -> dict[str, float]:
    """Median seconds a call of the slowest rank, by candidate."""
    return {name: median(times) for name, times in measured_rounds(calls, rounds, inner).items()}


def measured_rounds(calls: dict[str, Callable[[], Any]], rounds: int, inner: int) -> dict[str, list[float]]:
    """Seconds a call of the slowest rank in each round, by candidate; on every rank the same."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(inner):
                call()
            if number >= 2:  # the first two warm up
                times[name].append((time.perf_counter() - start) / inner)
    result: dict[str, list[float]] = {}
    for name, values in times.items():
        slowest = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        result[name] = slowest.tolist()
    return result


def worker(rank: int, P: int, store: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(P), LOCAL_RANK=str(rank))
    import fvops

    fvops.maybe_init_distributed_environment_and_model_parallel(1, P, distributed_init_method=f"file://{store}")
    own = fvops.get_sp_group()
    os.environ["FVOPS_TRANSPORT"] = "process_group"
    gloo = fvops.initialize_sequence_parallel_group(P, group_name_suffix="gloo")
    rows = []
    for dtype in options.dtypes:
        for size in options.sizes:
            nbytes = SIZES[size]
            for op, calls in candidates(own, gloo, nbytes, DTYPES[dtype]).items():
                if options.ops and op not in options.ops:
                    continue
                found = measure(calls, options.rounds, _INNER_SMALL if nbytes < 1_000_000 else _INNER_LARGE)
                row = {"P": P, "dtype": dtype, "size": size, "bytes": nbytes, "op": op, "ms": _ms(found)}
                rows.append(row)
                if rank == 0:
                    print(_line(row), flush=True)
    if rank == 0:
        Path(store + ".json").write_text(json.dumps(rows))
    fvops.get_world_group().barrier()
    fvops.cleanup_dist_env_and_memory()


def _ms(found: dict[str, float]) -> dict[str, float]:
    return {name: round(seconds * 1e3, 4) for name, seconds in found.items()}


def _line(row: dict[str, Any]) -> str:
    ms = row["ms"]
    shown = "  ".join(f"{name} {value / ms['fvops']:.1f}x" for name, value in ms.items() if name != "fvops")
    return f"P={row['P']} {row['dtype']:8} {row['size']:>7} {row['op']:14} fvops {ms['fvops']:8.3f} ms | {shown}"


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Time of an exchange over its bytes, log-log, a panel for each number of ranks; float32."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    exchanges = [row for row in rows if row["op"] == "all_to_all_4D" and row["dtype"] == "float32"]
    worlds = sorted({row["P"] for row in exchanges})
    figure, panels = pyplot.subplots(1, len(worlds), figsize=(6 * len(worlds), 4.8), sharey=True, squeeze=False)
    for panel, P in zip(panels[0], worlds, strict=True):
        of_world = sorted((row for row in exchanges if row["P"] == P), key=lambda row: row["bytes"])
        for name in of_world[0]["ms"]:
            style: dict[str, Any] = {"marker": "o", "markersize": 4}
            if name in (FLOOR, STRIDED_FLOOR):
                style = {"linestyle": "--" if name == FLOOR else ":", "color": "gray"}
            elif name == "fvops":
                style = {"marker": "o", "linewidth": 3, "color": "black"}
            panel.plot(
                [row["bytes"] / 1e6 for row in of_world], [row["ms"][name] for row in of_world], label=name, **style
            )
        panel.set(xscale="log", yscale="log", xlabel="MB a rank", title=f"all_to_all_4D (2, 1), float32, {P} ranks")
        for axis in (panel.xaxis, panel.yaxis):  # 0.1, 1, 10, not powers of ten
            axis.set_major_formatter(lambda value, _place: f"{value:g}")
        panel.grid(True, which="both", alpha=0.25)
    panels[0][0].set_ylabel("ms a call (median of the slowest rank)")
    panels[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--ops", nargs="*", default=[], help="e.g. all_to_all_4D 'q, k, v'; default: all")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json")
    parser.add_argument("--plot")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} before the run, torch {torch.__version__}"
    print(machine, flush=True)
    rows = []
    for P in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(worker, args=(P, f"{folder}/store", options), nprocs=P)
            rows += json.loads(Path(f"{folder}/store.json").read_text())
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
