"""How near packing comes to the device's own copy, for the models of `MODELS`. `tools/gpu_check.py` runs it on a GPU.

Per model and piece of work, each candidate lays the same bytes out once. Before every call a buffer that is larger than
the caches is written, which also hides what the host needs to issue the call; a call is timed between two CUDA events.
All candidates run in every round, in an order shuffled anew; a row holds their medians. The *share* is the time of
``dst.copy_(src)`` of as many bytes over the candidate's: 1.0 is as fast as the device copies. FastVideo's
sequence of copies was written by us from a description of its layouts; where it makes several, its share is of all.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fvops.kernels import layout
from fvops.kernels.pack import pack, unpack
from fvops.kernels.parts_plan import CopyConfig

__all__ = ["COPY", "FASTVIDEO", "FVOPS", "MODELS", "TORCH", "WORK", "bench", "block_shapes", "candidates"]

# (sequence length over all ranks, heads, head size), B=1; text tokens are part of the sequence where a model has them.
MODELS = {
    "Wan2.1 1.3B 480p": (32_760, 12, 128),
    "Wan2.1 14B 480p": (32_760, 40, 128),
    "Wan2.1 14B 720p": (75_600, 40, 128),
    "Wan2.2 5B 704p": (27_280, 24, 128),
    "HunyuanVideo 720p": (119_056, 24, 128),
    "FLUX.1 1024": (4_608, 24, 128),
    "CogVideoX-5B": (17_776, 48, 64),
    "LTX-Video 512x768": (6_144, 32, 64),
}
COPY, FVOPS, TORCH, FASTVIDEO = "copy", "fvops", "transpose().contiguous()", "FastVideo's copies"
WORK = ("pack (2,1)", "unpack (1,2)", "pack q, k, v (2,1)")
_FLUSH_BYTES = 1 << 30
# Elements of a program and its warps, for `block_shapes`.
_BLOCKS = ((512, 2), (512, 4), (1024, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 8), (8192, 8))

Call = Callable[[], Any]


def candidates(work: str, rows: int, heads: int, head_size: int, P: int, device: torch.device) -> dict[str, Call]:
    """The calls to compare for one of `WORK`, on bfloat16 tensors of one rank, the plain copy first.

    Args:
        rows: S/P.

    Raises:
        ValueError: for work that is not in `WORK`.
    """
    if work not in WORK:
        raise ValueError(f"work must be one of {WORK}, got {work!r}")
    count = 3 if work == WORK[2] else 1
    xs = [torch.randn(1, rows, heads, head_size, device=device).bfloat16() for _ in range(count)]
    source = torch.randn(count, rows, heads, head_size, device=device).bfloat16()
    target = torch.empty_like(source)
    copy = {COPY: lambda: target.copy_(source)}
    if work == WORK[1]:
        # What each rank sent of its heads; the output has them side by side again.
        received_PBSHD = layout.heads_by_rank(xs[0], P).contiguous()
        output, sent_BSHD = torch.empty_like(xs[0]), xs[0].view(1, rows * P, heads // P, head_size)
        return {
            **copy,
            FVOPS: lambda: unpack([received_PBSHD], [layout.heads_by_rank(output, P)]),
            TORCH: lambda: received_PBSHD.permute(1, 2, 0, 3, 4).contiguous(),
            FASTVIDEO: lambda: fastvideo_unpack_heads(fastvideo_pack_rows(sent_BSHD, P)),
        }
    return {
        **copy,
        FVOPS: lambda: pack([layout.heads_by_rank(x, P) for x in xs]),
        TORCH: lambda: [layout.heads_by_rank(x, P).contiguous() for x in xs],
        FASTVIDEO: lambda: fastvideo_unpack_rows(fastvideo_pack_heads(xs, P)),
    }


# FastVideo's copies, split where its exchange is. Letters: P ranks, s = S/P, h = H/P.


def fastvideo_pack_heads(xs: list[Tensor], P: int) -> Tensor:
    """Before the exchange of mode (2, 1): q, k, v joined along the batch, then ``[P, s, B, h, D]``."""
    x_BSHD = torch.cat(xs) if len(xs) > 1 else xs[0]
    B, s, H, D = x_BSHD.shape
    return x_BSHD.reshape(B, s, P, H // P, D).transpose(0, 2).contiguous()


def fastvideo_unpack_rows(received_PSBHD: Tensor) -> Tensor:
    """After it: ``[B, P*s, h, D]``; nothing is copied at B=1."""
    P, s, B, h, D = received_PSBHD.shape
    return received_PSBHD.reshape(P * s, B, h, D).transpose(0, 1).contiguous()


def fastvideo_pack_rows(x_BSHD: Tensor, P: int) -> Tensor:
    """Before the exchange of mode (1, 2): ``[P, h, s, B, D]``, heads before rows."""
    B, S, h, D = x_BSHD.shape
    return x_BSHD.reshape(B, P, S // P, h, D).permute(1, 3, 2, 0, 4).contiguous()


def fastvideo_unpack_heads(received_PHSBD: Tensor) -> Tensor:
    """After it: ``[B, s, P*h, D]``, turned back."""
    P, h, s, B, D = received_PHSBD.shape
    return received_PHSBD.reshape(P * h, s, B, D).transpose(0, 2).contiguous()


def seconds_of(call: Call, device: torch.device, flush: Tensor) -> float:
    """The time of one call: the device's between two events on CUDA, the host's elsewhere."""
    flush.zero_()
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def measure(calls: dict[str, Call], device: torch.device, flush: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of each call; the first three rounds warm up and are left out."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for number in range(rounds + 3):
        shuffle(order)
        for name in order:
            seconds = seconds_of(calls[name], device, flush)
            if number >= 3:
                times[name].append(seconds)
    return {name: median(values) for name, values in times.items()}


def bench(
    device: torch.device,
    models: dict[str, tuple[int, int, int]],
    rounds: int,
    P: int = 4,
    flush_bytes: int = _FLUSH_BYTES,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of all models and work, and what failed: one failure costs its own row only."""
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    flush = torch.empty(flush_bytes, dtype=torch.uint8, device=device)
    for model, (sequence, heads, head_size) in models.items():
        for work in WORK:
            try:
                calls = candidates(work, sequence // P, heads, head_size, P, device)
                seconds = measure(calls, device, flush, rounds)
            except Exception as error:  # reported, and the run fails; the other rows are still of use
                failures.append(f"{model}, {work}: {type(error).__name__}: {error}")
                continue
            nbytes = sequence // P * heads * head_size * 2 * (3 if work == WORK[2] else 1)
            rows.append(_row(model, work, nbytes, seconds))
    return rows, failures


def block_shapes(
    device: torch.device, models: dict[str, tuple[int, int, int]], rounds: int, P: int = 4
) -> list[dict[str, Any]]:
    """The Triton copy with other block shapes, as `bench`: what the default in `CopyConfig` is chosen by."""
    from fvops.kernels.parts_copy import copy_parts

    rows = []
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    for model, (sequence, heads, head_size) in models.items():
        x_BSHD = torch.randn(1, sequence // P, heads, head_size, device=device).bfloat16()
        by_heads, packed = layout.heads_by_rank(x_BSHD, P), layout.heads_by_rank(x_BSHD, P).contiguous()
        source, target = packed.clone(), torch.empty_like(packed)
        for work, pair in ((WORK[0], (by_heads, packed)), (WORK[1], (packed, by_heads))):
            calls: dict[str, Call] = {COPY: partial(target.copy_, source)}
            for elements, warps in _BLOCKS:
                sources, destinations = ([side] for side in pair)
                config = CopyConfig(elements, warps)
                calls[f"{elements} x {warps}"] = partial(copy_parts, sources, destinations, config)
            nbytes = x_BSHD.numel() * x_BSHD.element_size()
            rows.append(_row(model, work, nbytes, measure(calls, device, flush, rounds)))
    return rows


def _row(model: str, work: str, nbytes: int, seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "model": model,
        "work": work,
        "bytes": nbytes,
        "us": {name: round(value * 1e6, 2) for name, value in seconds.items()},
        "gb_per_s": {name: round(2 * nbytes / value / 1e9, 1) for name, value in seconds.items()},
        "share": {name: round(seconds[COPY] / value, 3) for name, value in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time packing on the first GPU; writes JSON.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("skipped: no CUDA device")
    rows, failures = bench(torch.device("cuda", 0), MODELS, arguments.rounds)
    found: dict[str, Any] = {"rows": rows, "block_shapes": [], "failures": failures}
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    few = {name: MODELS[name] for name in ("Wan2.1 14B 480p", "HunyuanVideo 720p", "LTX-Video 512x768")}
    found["block_shapes"] = block_shapes(torch.device("cuda", 0), few, arguments.rounds)
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
