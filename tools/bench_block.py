"""One Ulysses attention block, compiled, by fvops and by what others use: counts, bytes and times in one run.

    python -m tools.bench_block [--tokens 4096] [--train-tokens 2048] [--rounds 5] [--json FILE]

Wan 2.1 1.3B's width (12 heads of 128), float32, CPU ranks with one thread each. Counts are `fvops.report`'s and do not
depend on the machine. For each candidate: graphs; exchanges; layout kernels, and how many of them stand next to neither
a matrix product nor attention; copies that run uncompiled; bytes that these kernels and copies read and write, and
that a rank sends. Times are medians over rounds in which all candidates run in turn, of the slowest rank.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

import fvops
from fvops.graph_report import Kernel, Report
from tools.bench_collectives import measure
from tools.ulysses_blocks import DiffusersBlock, UlyssesBlock, UpstreamBlock

__all__ = ["main"]

_HEADS, _HEAD_SIZE = 12, 128
# name -> (block, switches)
_ALL: dict[str, Any] = {"merge": True, "cancel": True, "absorb": True, "overlap": True}
_CANDIDATES: dict[str, tuple[type[UlyssesBlock], dict[str, Any]]] = {
    "fvops, enable(), fused": (UlyssesBlock, {**_ALL, "layout": "fused"}),
    "fvops, fused, no overlap": (UlyssesBlock, {**_ALL, "layout": "fused", "overlap": False}),
    "fvops, fused, merge only": (UlyssesBlock, {"layout": "fused", "merge": True}),
    "fvops, enable()": (UlyssesBlock, _ALL),
    "fvops, defaults": (UlyssesBlock, {}),
    "diffusers": (DiffusersBlock, {}),
    "FastVideo's layer": (UpstreamBlock, {}),
}
_GEMM = ("mm", "addmm", "sum_of_products", "bmm", "baddbmm")


class _Copies(TorchDispatchMode):
    """Counts the copies that run outside of compiled graphs, and the bytes that they read and write."""

    _OPS = (torch.ops.aten.clone.default, torch.ops.aten.cat.default, torch.ops.aten.copy_.default)

    def __init__(self) -> None:
        super().__init__()
        self.count = self.nbytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in self._OPS and result.numel() > 1:
            self.count += 1
            self.nbytes += 2 * result.nbytes
        return result


def _step(block: Any, inputs: list[torch.Tensor], train: bool) -> Callable[[], Any]:
    def forward() -> Any:
        with torch.no_grad():
            return compiled(*inputs)

    def forward_and_backward() -> Any:
        return torch.autograd.grad(compiled(*inputs).square().sum(), leaves)

    def entry(*inputs: torch.Tensor) -> Any:
        return block(*inputs)

    # A code object of its own: blocks of one class pass each other's guards, and would run the first one's code.
    compiled = torch.compile(types.FunctionType(entry.__code__.replace(), entry.__globals__, closure=entry.__closure__))
    leaves = [*block.parameters(), inputs[0]]
    return forward_and_backward if train else forward


def _counts(report: Report, copies: _Copies) -> dict[str, int]:
    """What the table shows of one candidate."""
    kernels = report.layout_kernels
    exchanges = [one for one in report.collectives if "all_to_all" in one.op]
    return {
        "graphs": len(report.graphs),
        "exchanges": len(exchanges),
        "layout kernels": len(kernels),
        "of them next to no product or attention": sum(not beside_product(kernel) for kernel in kernels),
        "uncompiled copies": copies.count,
        "bytes copied": sum(kernel.nbytes for kernel in kernels) + copies.nbytes,
        "bytes sent": sum(one.sent_bytes for one in exchanges),
    }


def beside_product(kernel: Kernel) -> bool:
    names = [name.rsplit("::", 1)[-1] for name in kernel.beside]
    return any(name in _GEMM or "scaled_dot_product" in name for name in names)


@contextlib.contextmanager
def _switched(switches: dict[str, Any]) -> Iterator[None]:
    with fvops.compiler.enable(**switches) if switches else contextlib.nullcontext():
        yield


def _bench(tokens: int, train: bool, rounds: int) -> dict[str, dict[str, Any]]:
    """For each candidate counts, milliseconds, and the largest difference from the first one's result."""
    P = fvops.get_sp_world_size()
    generator = torch.Generator().manual_seed(fvops.get_sp_group().rank_in_group)
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], Any]] = {}
    results: dict[str, torch.Tensor] = {}
    inputs: list[torch.Tensor] = []
    for name, (kind, switches) in _CANDIDATES.items():
        torch.manual_seed(0)
        block = kind(_HEADS, _HEAD_SIZE)
        if not inputs:
            inputs = [torch.randn(size, generator=generator) for size in block.input_sizes(1, tokens // P)]
            inputs[0].requires_grad_(train)
        with _switched(switches):
            report = fvops.report(block, *inputs, backward=train)
            steps[name] = _step(block, inputs, train)
            results[name] = steps[name]()[0].detach() if train else steps[name]()
        with _Copies() as copies:
            # The uncompiled part alone; what is compiled is in the report.
            if kind is UpstreamBlock:
                _uncompiled_part(block, inputs, train)
        found[name] = _counts(report, copies)
        if kind is not UlyssesBlock:
            found[name]["exchanges"], found[name]["bytes sent"] = _by_hand(kind, inputs[0], P, train)
    first = next(iter(results.values()))
    milliseconds = {name: seconds * 1e3 for name, seconds in measure(steps, rounds, 1).items()}
    for name, row in found.items():
        row["ms"] = milliseconds[name]
        row["difference"] = float((results[name] - first).abs().max() / first.abs().max())
    return found


def _uncompiled_part(block: UlyssesBlock, inputs: list[torch.Tensor], train: bool) -> None:
    size = (1, inputs[0].size(1), _HEADS, _HEAD_SIZE)
    q, k, v = (torch.randn(size, requires_grad=train) for _ in range(3))
    out = block.exchange_and_attend(q, k, v)
    if train:
        torch.autograd.grad(out, (q, k, v), torch.randn(size))


def _by_hand(kind: type[UlyssesBlock], x: torch.Tensor, P: int, train: bool) -> tuple[int, int]:
    """Exchanges and bytes sent where graphs do not hold all: q, k and v, in one exchange or three, and the result."""
    ways = 2 if train else 1
    return (2 if kind is UpstreamBlock else 4) * ways, 4 * x.nbytes * (P - 1) // P * ways


def _worker(rank: int, P: int, store: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    # Each candidate is compiled twice, by the report and to be run.
    torch._dynamo.config.recompile_limit = 64
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(P), LOCAL_RANK=str(rank))
    fvops.maybe_init_distributed_environment_and_model_parallel(1, P, distributed_init_method=f"file://{store}")
    found = {}
    for what, tokens in (("forward", options.tokens), ("forward and backward", options.train_tokens)):
        if tokens:
            found[f"{what}, {tokens} tokens"] = _bench(tokens, what != "forward", options.rounds)
    if rank == 0:
        Path(store + ".json").write_text(json.dumps(found))
    fvops.get_world_group().barrier()
    fvops.cleanup_dist_env_and_memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096, help="of all ranks, in forward; 0: leave it out (4096)")
    parser.add_argument("--train-tokens", type=int, default=2048, help="in forward and backward together (2048)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="keep everything in this file")
    options = parser.parse_args()
    if (
        options.rounds < 1
        or options.ranks < 2
        or options.tokens % options.ranks
        or options.train_tokens % options.ranks
    ):
        parser.error("--rounds must be at least 1, --ranks at least 2 and divide both numbers of tokens")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    print(machine, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, args=(options.ranks, f"{folder}/store", options), nprocs=options.ranks)
        found = json.loads(Path(f"{folder}/store.json").read_text())
    for title, rows in found.items():
        _print_table(title, rows)
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": machine, "found": found}, indent=1))


def _print_table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    own = next(iter(rows.values()))["ms"]
    print(f"\n{title}")
    for name, row in rows.items():
        cells = [
            f"{key} {value / 1e6:.1f} MB" if "bytes" in key else f"{key} {value:.4g}" for key, value in row.items()
        ]
        print(f"{name:28} {row['ms'] / own:.3f} x | " + ", ".join(cells))


if __name__ == "__main__":
    main()
