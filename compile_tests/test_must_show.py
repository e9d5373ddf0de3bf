"""The counts in docs/performance.md's tables of fvops' own block: on planned ranks, at small sizes.

Counts depend neither on the machine nor on the number of tokens. And what `tools/must_show.py` says of figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

import fvops
from fvops.graph_report import planned_groups
from tools.bench_block import CANDIDATES, beside_product, largest_difference
from tools.block_tables import goals
from tools.must_show import in_page, markdown
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


def _found() -> dict[str, Any]:
    """What a run finds where every goal is just met."""
    counts = {"graphs": 1, "exchanges": 2, "layout kernels": 0, "of them next to no product or attention": 0}
    row = {**counts, "uncompiled copies": 0, "bytes copied": 0, "bytes sent": 6_291_456, "difference": 1e-7}
    times = {"ms": 20.0, "all ms": [18.0, 20.0, 31.0]}
    rows = {name: {**row, **times} for name in CANDIDATES}
    rows["fvops, fused layout and merge"]["layout kernels"] = 2
    rows["diffusers"]["ms"] = 25.0
    # 11 over 10 in the middle, whatever a single round says.
    compiled = {"alone cold": [10.0, 9.0, 11.0], "enabled cold": [11.0, 12.0, 10.5], "enabled warm": [2.7, 2.0, 2.8]}
    compiled |= {"alone cold cpu": [8.0, 8.0, 8.0], "enabled cold cpu": [8.4, 8.0, 9.0]}
    arguments = {"ranks": 2, "rounds": 3, "layers": 2, "compile_rounds": 9}
    facts = {"date": "today", "minutes": 1.0, "commit": "abc", "machine": "2 cores", "load before": 0.0}
    return {**facts, "arguments": arguments, "block": {"forward, 64 tokens": rows}, "compile": compiled}


def test_goals_that_are_just_met() -> None:
    found = _found()
    assert all(goal.met for goal in goals(found["block"], found["compile"]))
    text = markdown(found)
    assert "MISSED" not in text
    assert "2 blocks, 3 rounds" in text
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    }
    assert cells["diffusers"][1:3] == ["2", "0"]
    assert cells["diffusers"][-3:] == ["6.29", "25 (18 to 31)", "1.25 x"]
    assert cells["fvops, fused layout and merge"][2] == "2, next to a GEMM or SDPA"
    assert cells["sequence-parallel, `enable()`"][:2] == ["11.0 (10.5 to 12.0)", "1.100 (0.955 to 1.333)"]
    assert cells["sequence-parallel, `enable()`"][2] == "1.050 (1.000 to 1.125)"


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        (lambda found, rows: rows["fvops, enable()"].update(exchanges=4), "`enable()`, forward: 2 exchanges"),
        (lambda found, rows: rows["fvops, enable(), fused layout"].update({"layout kernels": 1}), "(absorb)"),
        (
            lambda found, rows: rows["fvops, fused layout and merge"].update(
                {"of them next to no product or attention": 1}
            ),
            "but next to a GEMM or SDPA",
        ),
        (lambda found, rows: found["compile"].update({"alone cold": [9.9] * 3}), "at most 1.10 x"),
        (lambda found, rows: found["compile"].update({"enabled warm": [2.75] * 3}), "under 0.25 of cold"),
    ],
    ids=["exchanges", "layout kernels", "elsewhere", "compile time", "warm start"],
)
def test_a_goal_that_is_missed(change: Any, missed: str) -> None:
    found = _found()
    change(found, found["block"]["forward, 64 tokens"])
    [goal] = [goal for goal in goals(found["block"], found["compile"]) if not goal.met]
    assert missed in goal.what
    assert markdown(found).count("MISSED") == 1


def test_where_the_page_takes_the_tables() -> None:
    page = (Path(__file__).parents[1] / "docs/performance.md").read_text()
    once = in_page(page, "ONE RUN")
    twice = in_page(once, "ANOTHER RUN")
    assert "ONE RUN" in once
    assert twice == once.replace("ONE RUN", "ANOTHER RUN")
    before = page.index("<!-- must show")
    assert (once[:before], once[-200:]) == (page[:before], page[-200:])
    with pytest.raises(ValueError, match="needs the lines"):
        in_page("no marks", "a run")


def test_results_that_differ_end_a_run() -> None:
    first = [torch.tensor([1.0, 2.0]), torch.tensor([100.0, 0.0])]
    assert largest_difference("same", [one.clone() for one in first], first) == 0
    close = [first[0] + 1e-4, first[1]]
    assert largest_difference("close", close, first) == pytest.approx(5e-5, rel=1e-2)
    for place, wrong in ((0, 2.01), (1, 100.2), (1, float("nan")), (0, float("inf"))):
        results = [one.clone() for one in first]
        results[place].view(-1)[-1 if place == 0 else 0] = wrong
        with pytest.raises(RuntimeError, match="wrong differs from the first candidate by"):
            largest_difference("wrong", results, first)
