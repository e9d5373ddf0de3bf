"""Promise 2: a compiled program issues, on every rank, the collectives that eager issues, in eager's order."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

from compile_tests.random_programs import Step, first_value, programs, run, run_steps
from fvops.debug import canonical
from tests.harness import Ranks

# What a program is compiled with; the drawn programs take them in turn.
VARIANTS: list[dict[str, Any]] = [
    {},
    {"dynamic": True},
    {"mode": "reduce-overhead"},
    {"options": {"reorder_for_compute_comm_overlap": True}},
    {"options": {"triton.cudagraphs": True, "graph_partition": True}},
    {"backend": "aot_eager"},
]
# The same for `make test`: but for the first, what lies between collectives runs as aten calls, not as kernels that a
# C++ compiler takes seconds for. Lowering and scheduling of the collectives are the same.
ATEN_BETWEEN = {"fallback_by_default": True}
QUICK_VARIANTS: list[dict[str, Any]] = [
    {},
    {"dynamic": True, "options": ATEN_BETWEEN},
    {"options": {"triton.cudagraphs": True, **ATEN_BETWEEN}},
    {"options": {"reorder_for_compute_comm_overlap": True, **ATEN_BETWEEN}},
    {"options": {"triton.cudagraphs": True, "graph_partition": True, **ATEN_BETWEEN}},
    {"backend": "aot_eager"},
]
PROGRAMS = 20
# Program drawing is derandomized: a failure comes back at the next run.
SETTINGS = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # shrinking would compile for an hour
    suppress_health_check=list(HealthCheck),
)


def _both_ways(steps: list[Step], variant: dict[str, Any], train: bool) -> tuple[str, int]:
    """What differs between eager and compiled ("" if nothing), and how many collectives there were."""
    x = first_value()

    def program(x: Tensor) -> list[Tensor]:
        return run_steps(steps, x)[1:]

    expected, records = run(program, x, train)
    got, compiled_records = run(torch.compile(program, fullgraph=True, **variant), x, train)
    expected_records, got_records = canonical(records), canonical(compiled_records)
    if got_records != expected_records:
        return f"eager issued {expected_records}\ncompiled issued {got_records}", len(expected_records)
    for index, (e, g) in enumerate(zip(expected, got, strict=True)):
        if not torch.allclose(e, g, rtol=1e-9, atol=1e-9, equal_nan=True):
            return f"value {index} differs by {(e - g).abs().max()}", len(expected_records)
    return "", len(expected_records)


def _check(world_size: int, train: bool, count: int, length: int, variants: list[dict[str, Any]]) -> None:
    drawn = Counter[str]()

    @settings(SETTINGS, max_examples=count)
    @given(steps=programs(world_size, length))
    def check(steps: list[Step]) -> None:
        variant = variants[drawn["programs"] % len(variants)]
        drawn["programs"] += 1
        results = Ranks.get(world_size).run(_both_ways, steps, variant, train, deadline_s=400)
        drawn["collectives"] += results[0][1]
        differences = {rank: text for rank, (text, _) in enumerate(results) if text}
        assert not differences, f"{steps} compiled with {variant}: {differences}"

    check()
    # So that a change to the drawing cannot quietly leave nothing to check.
    assert drawn["programs"] >= count
    assert drawn["collectives"] >= 2 * count


@pytest.mark.parametrize(
    ("world_size", "count", "train"),
    [
        pytest.param(2, PROGRAMS // 2 - 1, False, marks=pytest.mark.slow, id="2-inference"),
        pytest.param(2, PROGRAMS // 4, True, id="2-training"),
        pytest.param(4, 2, False, id="4-inference"),
        pytest.param(4, 2, True, id="4-training"),
    ],
)
def test_random_programs_issue_the_same_collectives(world_size: int, count: int, train: bool) -> None:
    _check(world_size, train, count, 6, QUICK_VARIANTS)


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_many_random_programs_issue_the_same_collectives(world_size: int, train: bool) -> None:
    _check(world_size, train, int(os.environ.get("FVOPS_RANDOM_PROGRAMS", "200")) // 6 + 1, 9, VARIANTS)


def _without_ordering(steps: list[Step]) -> tuple[str, int]:
    """The comparison, with effects and lowerings of all ops switched off."""
    from torch._inductor.lowering import lowerings
    from torch._library.simple_registry import singleton

    from fvops import compiler

    compiler.install()
    kept = {op: lowerings.pop(op) for op in compiler.ordered_ops}
    effects = {op: singleton.find(op._name).effect for op in compiler.ordered_ops}
    before = {op: effect._effect for op, effect in effects.items()}
    try:
        for effect in effects.values():
            effect._effect = None
        return _both_ways(steps, {}, False)
    finally:
        lowerings.update(kept)
        for op, effect in effects.items():
            effect._effect = before[op]


def test_the_comparison_reports_a_lost_order(two_ranks: Ranks) -> None:
    """With the mechanism switched off, unused results are dropped: the test above is able to fail.

    The program is one that every rank loses alike. Where ranks lose different calls, as with `gather`, they hang.
    """
    steps: list[Step] = [
        ("all_to_all_4D", 0, "sp", 2, 1),
        ("all_gather", 0, "sp", 1),
        ("sin", 1, "sp"),
        ("all_reduce", 0, "sp", "sum"),
        ("all_reduce", 0, "sp", "sum"),
    ]
    for text, count in two_ranks.run(_without_ordering, steps, deadline_s=180):
        assert count == 4
        assert "compiled issued" in text
    assert two_ranks.run(_both_ways, steps, {}, False, deadline_s=180) == [("", 4), ("", 4)]
