"""What sequence parallelism adds to compile time, and what a warm start costs: a Wan transformer on 2 CPU ranks.

    python tools/bench_compile.py [--rounds 3] [--layers 2]

Each measurement is a pair of new processes, because a process compiles for the first time only once. "alone" runs the
whole model in each of the two, without a collective; "parallel" splits the sequence over them. So both compile with the
same load on the machine. Cold is with an empty cache folder, warm with the one that the cold pair has left. The time is
the first call's minus the second's, of the slower process.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

__all__ = ["main"]

_RANKS = 2
_DEADLINE_S = 900


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured, in turn (3)")
    parser.add_argument("--layers", type=int, default=2, help="transformer blocks (2)")
    parser.add_argument("--worker", choices=("alone", "parallel"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 1 or args.layers < 1:
        parser.error("--rounds and --layers must be at least 1")
    if args.worker:
        print(json.dumps(_first_minus_second(args.worker, args.layers)))
        return
    print(f"load before: {os.getloadavg()[0]:.1f}", flush=True)
    seconds: dict[str, list[float]] = {}
    for number in range(args.rounds):
        for way in ("alone", "parallel"):
            with tempfile.TemporaryDirectory(prefix="fvops-compile-") as folder:
                for start in ("cold", "warm"):
                    took = _pair(way, args.layers, Path(folder))
                    seconds.setdefault(f"{way} {start}", []).append(took)
                    print(f"round {number}: {way} {start} {took:.1f} s", flush=True)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:14} median {median:6.1f} s of {', '.join(f'{one:.1f}' for one in seconds[name])}")
    print(f"parallel / alone, cold: {medians['parallel cold'] / medians['alone cold']:.3f} (goal: at most 1.10)")
    print(f"warm / cold, parallel:  {medians['parallel warm'] / medians['parallel cold']:.3f} (goal: under 0.25)")
    print(f"warm / cold, alone:     {medians['alone warm'] / medians['alone cold']:.3f}")
    print(f"load after: {os.getloadavg()[0]:.1f}")


def _pair(way: str, layers: int, folder: Path) -> float:
    """Seconds of the slower of the two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", way, "--layers", str(layers)]
    processes = []
    for rank in range(_RANKS):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(_RANKS)}
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        # A folder each: the whole model is the same in both, and one must not find what the other compiled.
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / str(rank)), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        environment = {**os.environ, **place, **rendezvous, **cache, "CUDA_VISIBLE_DEVICES": ""}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        outputs = [process.communicate(timeout=_DEADLINE_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(process.returncode for process in processes):
        raise SystemExit(f"bench_compile: {way} failed; its ranks' own words are above")
    return max(float(json.loads(output.splitlines()[-1])) for output in outputs)


def _first_minus_second(way: str, layers: int) -> float:
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
    if way == "parallel":
        parallelize(model)
    compiled = torch.compile(model, fullgraph=True)
    inputs = {
        "hidden_states": torch.randn(1, 16, 2, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 32, 4096),
        "return_dict": False,
    }
    times = []
    for _call in range(2):
        start = time.perf_counter()
        with torch.no_grad():
            compiled(**inputs)
        times.append(time.perf_counter() - start)
    fvops.cleanup_dist_env_and_memory()
    return times[0] - times[1]


if __name__ == "__main__":
    main()
