"""What sequence parallelism adds to compile time, and what a warm start costs: a Wan transformer on 2 CPU ranks.

    python -m tools.bench_compile [--compile-rounds 3] [--layers 2] [--ways alone parallel enabled]

Each measurement is a pair of new processes, because a process compiles for the first time only once. "alone" runs the
whole model in each of the two, without a collective; "parallel" splits the sequence over them, with fvops' default
passes, and "enabled" does under `fvops.compiler.enable()`. So all compile with the same load on the machine. Cold is
with an empty cache folder, warm with the one that the cold pair has left. The time is the first call's minus the
second's, of the slower process; the same of what the processor spent ("cpu"), which other load changes less.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tools.block_tables import compile_table

__all__ = ["WAYS", "add_arguments", "check_arguments", "main", "measured"]

WAYS = ("alone", "parallel", "enabled")
_RANKS = 2
_ROOT = Path(__file__).resolve().parents[1]
_DEADLINE_S = 900


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `measured`."""
    parser.add_argument("--compile-rounds", type=int, default=3, help="how often each is measured, in turn (3)")
    parser.add_argument("--layers", type=int, default=2, help="transformer blocks (2)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")


def check_arguments(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program where `measured` could not run."""
    if options.compile_rounds < 0 or options.layers < 1:
        parser.error("--compile-rounds must not be negative, --layers at least 1")


def measured(options: argparse.Namespace, until: float = math.inf) -> dict[str, list[float]]:
    """Seconds of each round, by way and start ("enabled cold", "enabled cold cpu"). Tells of each as it ends.

    Args:
        until: on `time.perf_counter`'s clock: after the first round, none is begun that would end later.
    """
    seconds: dict[str, list[float]] = {}
    longest = 0.0
    for number in range(options.compile_rounds):
        begun = time.perf_counter()
        if number and begun + longest > until:
            print(f"compile: no time for more than {number} of {options.compile_rounds} rounds", flush=True)
            break
        for way in options.ways:
            with tempfile.TemporaryDirectory(prefix="fvops-compile-") as folder:
                # A warm start of the model alone is no part of any goal.
                for start in ("cold",) if way == "alone" else ("cold", "warm"):
                    took, cpu = _pair(way, options.layers, Path(folder))
                    seconds.setdefault(f"{way} {start}", []).append(round(took, 2))
                    seconds.setdefault(f"{way} {start} cpu", []).append(round(cpu, 2))
                    print(f"compile, round {number}: {way} {start} {took:.1f} s, cpu {cpu:.1f} s", flush=True)
        longest = max(longest, time.perf_counter() - begun)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    check_arguments(parser, options)
    if options.worker:
        print(json.dumps(_first_minus_second(options.worker, options.layers)))
        return
    print(f"load before: {os.getloadavg()[0]:.1f}", flush=True)
    print(compile_table(measured(options)))
    print(f"load after: {os.getloadavg()[0]:.1f}")


def _pair(way: str, layers: int, folder: Path) -> tuple[float, float]:
    """Seconds, and seconds of processor time, of the slower of the two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tools.bench_compile", "--worker", way, "--layers", str(layers)]
    processes = []
    for rank in range(_RANKS):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(_RANKS)}
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        # A folder each: the whole model is the same in both, and one must not find what the other compiled.
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / str(rank)), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        environment = {**os.environ, **place, **rendezvous, **cache, "CUDA_VISIBLE_DEVICES": ""}
        processes.append(subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        outputs = [process.communicate(timeout=_DEADLINE_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(process.returncode for process in processes):
        raise SystemExit(f"bench_compile: {way} failed; its ranks' own words are above")
    took, cpu = zip(*(json.loads(output.splitlines()[-1]) for output in outputs), strict=True)
    return max(took), max(cpu)


def _first_minus_second(way: str, layers: int) -> tuple[float, float]:
    import torch
    from diffusers import WanTransformer3DModel

    import fvops
    from fvops.integrations.diffusers import parallelize

    torch.set_num_threads(1)
    fvops.maybe_init_distributed_environment_and_model_parallel(tp_size=1, sp_size=_RANKS)
    torch.manual_seed(0)
    # Wan 2.1 1.3B's width; few tokens, since compile time does not depend on their number.
    wan: Any = WanTransformer3DModel
    model = wan(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=layers, text_dim=4096).eval()
    if way != "alone":
        parallelize(model)
    if way == "enabled":
        fvops.compiler.enable()
    compiled = torch.compile(model, fullgraph=True)
    inputs = {
        "hidden_states": torch.randn(1, 16, 2, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 32, 4096),
        "return_dict": False,
    }
    times = []
    for _call in range(2):
        start, cpu = time.perf_counter(), _processor_s()
        with torch.no_grad():
            compiled(**inputs)
        times.append((time.perf_counter() - start, _processor_s() - cpu))
    fvops.cleanup_dist_env_and_memory()
    (first, first_cpu), (second, second_cpu) = times
    return first - second, first_cpu - second_cpu


def _processor_s() -> float:
    """Of this process and of the compilers that it has started and that have ended."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    main()
