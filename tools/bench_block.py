"""One Ulysses attention block, compiled, by fvops and by what others use: counts, bytes and times in one run.

    python -m tools.bench_block [--tokens 2048] [--train-tokens 1024] [--rounds 9] [--json FILE]

Wan 2.1 1.3B's width (12 heads of 128), float32, CPU ranks with one thread each. All counts are counted, none is written
down here: graphs, layout kernels, how many of these stand next to neither a matrix product nor attention, and the
bytes that they read and write are `fvops.report`'s, of the compiled graphs; exchanges and the bytes that a rank sends
are those that one step issues; copies that run uncompiled are counted as that part runs. Times are of the slowest
rank, in rounds in which all candidates run in turn. `tools/must_show.py` runs this and the compile times.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

import fvops
from fvops.debug import record_collectives
from fvops.graph_report import Kernel, Report
from tools.bench_collectives import measured_rounds
from tools.block_tables import tables
from tools.ulysses_blocks import DiffusersBlock, UlyssesBlock, UpstreamBlock

__all__ = ["CANDIDATES", "add_arguments", "beside_product", "check_arguments", "largest_difference", "main", "measured"]

# Results of the candidates may differ in the last digits only.
_TOLERANCE = 1e-3
_HEADS, _HEAD_SIZE = 12, 128
_ALL: dict[str, Any] = {"merge": True, "cancel": True, "absorb": True, "overlap": True}
# name -> (block, switches). The first one is what the others are compared with.
CANDIDATES: dict[str, tuple[type[UlyssesBlock], dict[str, Any]]] = {
    "fvops, enable()": (UlyssesBlock, _ALL),
    "fvops, enable(), fused layout": (UlyssesBlock, {**_ALL, "layout": "fused"}),
    "fvops, the same, no overlap": (UlyssesBlock, {**_ALL, "layout": "fused", "overlap": False}),
    "fvops, fused layout and merge": (UlyssesBlock, {"layout": "fused", "merge": True}),
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


def _counts(report: Report, copies: _Copies, issued: list[int]) -> dict[str, int]:
    """What the table shows of one candidate.

    Args:
        issued: bytes sent by each exchange of one step.
    """
    kernels = report.layout_kernels
    return {
        "graphs": len(report.graphs),
        "exchanges": len(issued),
        "layout kernels": len(kernels),
        "of them next to no product or attention": sum(not beside_product(kernel) for kernel in kernels),
        "uncompiled copies": copies.count,
        "bytes copied": sum(kernel.nbytes for kernel in kernels) + copies.nbytes,
        "bytes sent": sum(issued),
    }


def _issued(step: Callable[[], Any], P: int) -> list[int]:
    """Bytes that leave this rank in each exchange of one step: fvops', or those over a process group of torch.

    Raises:
        RuntimeError: the step issues exchanges of both kinds, or none.
    """
    with record_collectives() as records, torch.profiler.profile(record_shapes=True) as profile:
        step()
    own = [record.nbytes for record in records if record.op.startswith("all_to_all")]
    # The op's arguments: what is received, what is sent.
    torchs = [
        math.prod(event.input_shapes[1]) * torch.float32.itemsize
        for event in profile.events() or ()
        if event.name == "c10d::alltoall_base_"
    ]
    if bool(own) == bool(torchs):
        raise RuntimeError(f"bench_block: fvops issued {len(own)} exchanges and torch {len(torchs)}; one must be 0")
    return [nbytes * (P - 1) // P for nbytes in own or torchs]


def beside_product(kernel: Kernel) -> bool:
    names = [name.rsplit("::", 1)[-1] for name in kernel.beside]
    return any(name in _GEMM or "scaled_dot_product" in name for name in names)


@contextlib.contextmanager
def _switched(switches: dict[str, Any]) -> Iterator[None]:
    with fvops.compiler.enable(**switches) if switches else contextlib.nullcontext():
        yield


def _bench(tokens: int, train: bool, rounds: int) -> dict[str, dict[str, Any]]:
    """For each candidate counts, milliseconds, and the largest difference from the first one's results."""
    P = fvops.get_sp_world_size()
    generator = torch.Generator().manual_seed(fvops.get_sp_group().rank_in_group)
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], Any]] = {}
    results: dict[str, list[torch.Tensor]] = {}
    inputs: list[torch.Tensor] = []
    for name, (kind, switches) in CANDIDATES.items():
        torch.manual_seed(0)
        block = kind(_HEADS, _HEAD_SIZE)
        if not inputs:
            inputs = [torch.randn(size, generator=generator) for size in block.input_sizes(1, tokens // P)]
            inputs[0].requires_grad_(train)
        with _switched(switches):
            report = fvops.report(block, *inputs, backward=train)
            steps[name] = _step(block, inputs, train)
            result = steps[name]()
        results[name] = [tensor.detach() for tensor in (result if train else [result])]
        with _Copies() as copies:
            # The uncompiled part alone; what is compiled is in the report.
            if kind is UpstreamBlock:
                _uncompiled_part(block, inputs, train)
        found[name] = _counts(report, copies, _issued(steps[name], P))
        if kind is UlyssesBlock and found[name]["exchanges"] != len(report.collectives):
            raise RuntimeError(f"bench_block: {name}: {found[name]['exchanges']} exchanges ran, not as in the report")
    first = next(iter(results.values()))
    for name, seconds in measured_rounds(steps, rounds, 1).items():
        row = found[name]
        row["ms"] = median(seconds) * 1e3
        row["all ms"] = [round(one * 1e3, 3) for one in seconds]
        row["difference"] = largest_difference(name, results[name], first)
    return found


def largest_difference(name: str, results: list[torch.Tensor], first: list[torch.Tensor]) -> float:
    """Relative to each tensor's largest element.

    Raises:
        RuntimeError: it is more than the last digits, or not a number.
    """
    each = [(one - other).abs().max() / other.abs().max() for one, other in zip(results, first, strict=True)]
    difference = float(torch.stack(each).max())
    if not difference <= _TOLERANCE:
        raise RuntimeError(f"bench_block: {name} differs from the first candidate by {difference:.2g}")
    return difference


def _uncompiled_part(block: UlyssesBlock, inputs: list[torch.Tensor], train: bool) -> None:
    size = (1, inputs[0].size(1), _HEADS, _HEAD_SIZE)
    q, k, v = (torch.randn(size, requires_grad=train) for _ in range(3))
    out = block.exchange_and_attend(q, k, v)
    if train:
        torch.autograd.grad(out, (q, k, v), torch.randn(size))


def _worker(rank: int, P: int, store: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    # Each candidate is compiled twice, by the report and to be run.
    torch._dynamo.config.recompile_limit = 64
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(P), LOCAL_RANK=str(rank))
    fvops.maybe_init_distributed_environment_and_model_parallel(1, P, distributed_init_method=f"file://{store}")
    found = {}
    for what, tokens in (("forward", options.tokens), ("forward and backward", options.train_tokens)):
        if tokens:
            # A number of tokens that changes within a process becomes a symbol, and other kernels come of it.
            torch._dynamo.reset()
            found[f"{what}, {tokens} tokens"] = _bench(tokens, what != "forward", options.rounds)
    if rank == 0:
        Path(store + ".json").write_text(json.dumps(found))
    fvops.get_world_group().barrier()
    fvops.cleanup_dist_env_and_memory()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `measured`."""
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048, help="of all ranks, in forward; 0: leave it out (2048)")
    parser.add_argument("--train-tokens", type=int, default=1024, help="in forward and backward together (1024)")
    parser.add_argument("--rounds", type=int, default=9, help="how often each candidate is timed (9)")


def check_arguments(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program where `measured` could not run."""
    uneven = options.ranks < 2 or options.tokens % options.ranks or options.train_tokens % options.ranks
    if options.rounds < 1 or uneven:
        parser.error("--rounds must be at least 1, --ranks at least 2 and divide both numbers of tokens")


def measured(options: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """A table for forward, and one for forward and backward: what was found, by the candidate's name."""
    # The profiler would write to stderr; read when torch is imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, args=(options.ranks, f"{folder}/store", options), nprocs=options.ranks)
        found: dict[str, dict[str, dict[str, Any]]] = json.loads(Path(f"{folder}/store.json").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--json", help="keep everything in this file")
    options = parser.parse_args()
    check_arguments(parser, options)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    print(machine, flush=True)
    found = measured(options)
    print(tables(found))
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": machine, "block": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
