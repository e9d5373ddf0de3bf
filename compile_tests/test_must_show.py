"""The counts in docs/performance.md's tables of fvops' own block: on planned ranks, at small sizes.

Counts depend neither on the machine nor on the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

import fvops
from fvops.graph_report import planned_groups
from tools.bench_block import beside_product
from tools.ulysses_blocks import UlyssesBlock

HEADS, HEAD_SIZE, TOKENS = 4, 16, 12

# What `enable` is called with, one after another -> exchanges and layout kernels: forward, then with backward.
ROWS: dict[str, tuple[list[dict[str, Any]], tuple[int, int], tuple[int, int]]] = {
    "enable()": ([{}], (2, 0), (4, 1)),
    "enable() and fused layout": ([{}, {"layout": "fused"}], (2, 0), (4, 1)),
    "the same without overlap": ([{}, {"layout": "fused", "overlap": False}], (2, 0), (4, 1)),
    "fused layout and merge": ([{"layout": "fused", "merge": True}], (2, 2), (4, 5)),
    "defaults": ([], (4, 0), (8, 1)),
}


@pytest.fixture(autouse=True)
def _nothing_known_of_other_sizes() -> Iterator[None]:
    """Dynamo takes a size that it has seen change for a symbol, in later tests of this block too."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _counts(calls: list[dict[str, Any]], backward: bool) -> tuple[int, int, int, bool]:
    """Graphs, exchanges, layout kernels; whether each of these stands next to a matrix product or attention."""
    with torch.device("meta"):
        block = UlyssesBlock(HEADS, HEAD_SIZE)
        inputs = [torch.empty(size) for size in block.input_sizes(1, TOKENS)]
    with planned_groups(sp_size=2), ExitStack() as switched:
        for call in calls:
            switched.enter_context(fvops.compiler.enable(**call))
        report = fvops.report(block, *inputs, backward=backward)
    kernels = report.layout_kernels
    return len(report.graphs), len(report.collectives), len(kernels), all(map(beside_product, kernels))


@pytest.mark.parametrize("row", ROWS)
def test_one_block_s_forward(row: str) -> None:
    calls, (exchanges, layouts), _ = ROWS[row]
    assert _counts(calls, backward=False) == (1, exchanges, layouts, True)


@pytest.mark.slow  # test_pass_absorb.py looks at two of these in full
@pytest.mark.parametrize("row", ROWS)
def test_forward_and_backward(row: str) -> None:
    calls, _, (exchanges, layouts) = ROWS[row]
    assert _counts(calls, backward=True) == (2, exchanges, layouts, True)
