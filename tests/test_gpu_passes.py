"""The compiler passes on a GPU: a Ulysses block on two ranks that share it, its exchanges on symmetric memory.

Here exchanges are opened up for Inductor's GPU kernels, and what overlaps runs on a side stream, captured and not. The
same body runs on CPU ranks, where compile_tests/ covers the passes in detail.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.devices import GPU
from tests.harness import Ranks

EVERYTHING = {"layout": "fused", "merge": True, "cancel": True, "overlap": True, "absorb": True}
SWITCHES: dict[str, dict[str, Any]] = {
    "defaults": {"layout": "auto"},
    "one pass": {"layout": "exchange"},
    "merge": {"layout": "fused", "merge": True},
    "overlap": {"layout": "fused", "overlap": True},
    "everything": EVERYTHING,
}
# What each issues: q, k and v, together where they are merged, then the output.
MERGING = ("merge", "everything")
_B, _ROWS, _HEADS, _D = 1, 64, 4, 32


@pytest.fixture(params=[pytest.param("auto", id="cpu"), pytest.param("gpu-symm", id="cuda", marks=GPU)])
def two(request: pytest.FixtureRequest) -> Ranks:
    return Ranks.get(2, request.param)


def _turned(x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Normalised, then with a rotary embedding."""
    x_BSHD = F.rms_norm(x_BSHD, x_BSHD.shape[-1:])
    return x_BSHD * cos + x_BSHD.flip(-1) * sin


def _block(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, S/P, H*D]`` -> attention over all of S, and a product that does not need it."""
    import fvops

    group = fvops.get_sp_group()
    q, k, v = (F.linear(x, part).unflatten(2, (_HEADS, _D)) for part in weight.chunk(4)[:3])
    received = [group.all_to_all_4D(y, 2, 1).transpose(1, 2) for y in (_turned(q, cos, sin), _turned(k, cos, sin), v)]
    attended_BSHD = F.scaled_dot_product_attention(*received).transpose(1, 2)
    output = group.all_to_all_4D(attended_BSHD, 1, 2).flatten(2)
    return F.linear(output, weight.chunk(4)[3]), x @ weight.chunk(4)[0]


def _compared(switches: dict[str, Any], graphs: bool, train: bool) -> tuple[list[str], list[list[str]]]:
    """What of the compiled block differs from eager's, in three calls, and what each compiled call issued."""
    import fvops
    from fvops.debug import record_collectives

    group = fvops.get_sp_group()
    device, channels = group.device, _HEADS * _D
    group.warmup([(_B, _ROWS, _HEADS, _D)], torch.float32)
    compiled = torch.compile(
        _block, fullgraph=True, options={**fvops.compiler.options(**switches), "triton.cudagraphs": graphs}
    )
    wrong, issued = [], []
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(4 * channels, channels, generator=generator) / channels**0.5).to(device)
    angle = torch.randn(1, _ROWS, 1, _D, generator=generator).to(device)
    for call in range(3):
        x = torch.randn(_B, _ROWS, channels, generator=torch.Generator().manual_seed(10 * call + group.rank_in_group))
        results = []
        for function in (_block, compiled):
            leaves = [x.to(device).requires_grad_(train), weight.clone().requires_grad_(train)]
            with record_collectives() as records, torch.set_grad_enabled(train):
                outputs = [output.clone() for output in function(*leaves, angle.cos(), angle.sin())]
                if train:
                    sum(output.cos().sum() for output in outputs).backward()
            results.append([output.detach() for output in outputs] + [leaf.grad for leaf in leaves if train])
        issued.append([record.op for record in records])
        for number, (eager, got) in enumerate(zip(*results, strict=True)):
            if not torch.allclose(eager, got, rtol=1e-4, atol=1e-4):
                wrong.append(f"call {call}, result {number}: off by {float((eager - got).abs().max())}")
    torch._dynamo.reset()
    return wrong, issued


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", SWITCHES)
def test_the_compiled_block(two: Ranks, name: str, train: bool) -> None:
    for wrong, issued in two.run(_compared, SWITCHES[name], False, train, deadline_s=200):
        assert not wrong
        merged, single = "all_to_all_4D_coalesced", "all_to_all_4D"
        forward = [merged, single] if name in MERGING else [single] * 4
        assert [ops[: len(forward)] for ops in issued] == [forward] * 3
        assert {len(ops) for ops in issued} == {len(forward) * (1 + train)}


@pytest.mark.parametrize("name", [pytest.param(name, marks=GPU) for name in SWITCHES])
def test_in_cuda_graphs(name: str) -> None:
    for wrong, issued in Ranks.get(2, "gpu-symm").run(_compared, SWITCHES[name], True, False, deadline_s=200):
        assert not wrong
        assert issued[-1] == []  # a replay, in which no Python runs
