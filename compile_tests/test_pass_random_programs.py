"""Random programs under every combination of passes: values as eager's, the sequences that the passes promise."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import fvops
from compile_tests.random_programs import FOR_CANCEL, FOR_MERGE, Step, first_value, programs, run, run_steps
from compile_tests.test_random_programs import SETTINGS, VARIANTS
from fvops.debug import CollectiveRecord
from tests.harness import Ranks

# A group, an op and one tensor's shape, with the op's arguments: exchanges of several tensors are taken apart.
Sent = tuple[str, str, tuple[int, ...], tuple[Any, ...]]

PASSES: list[dict[str, Any]] = [
    {"merge": True},
    {"merge": True, "cancel": True},
    {"layout": "fused", "merge": True, "cancel": True},
    {"cancel": True},
    {"layout": "fused"},
    {"layout": "fused", "merge": 2048},
]


def _taken_apart(records: list[CollectiveRecord]) -> list[Sent]:
    return [
        (record.group, record.op.removesuffix("_coalesced"), shape, record.arguments)
        for record in records
        for shape in record.shapes or ((),)
    ]


def _missing(eager: list[Sent], compiled: list[Sent]) -> list[Sent] | None:
    """What has to be left out of `eager` to get `compiled`; None where that is not enough."""
    rest, missing = list(compiled), []
    for sent in eager:
        if rest and rest[0] == sent:
            rest.pop(0)
        else:
            missing.append(sent)
    return None if rest else missing


def _both_ways(steps: list[Step], passes: dict[str, Any], variant: dict[str, Any], train: bool) -> dict[str, Any]:
    """What differs from eager, how many tensors were sent, in how many calls, and the calls themselves."""
    x = first_value()

    def program(x: Tensor) -> list[Tensor]:
        return run_steps(steps, x)[1:]

    expected, records = run(program, x, train)
    with fvops.compiler.enable(**passes):
        got, compiled_records = run(torch.compile(program, fullgraph=True, **variant), x, train)
    eager, compiled = _taken_apart(records), _taken_apart(compiled_records)
    missing = _missing(eager, compiled)
    found = {"difference": "", "calls": [(record.group, record.op) for record in compiled_records]}
    found["counts"] = {"eager": len(records), "compiled": len(compiled_records), "cancelled": len(missing or ())}
    if missing is None or (missing and "cancel" not in passes):
        found["difference"] = f"eager sent {eager}, compiled sent {compiled}"
    elif any(op != "all_to_all_4D" for _, op, _, _ in missing):
        found["difference"] = f"cancelled {missing}"
    for index, (e, g) in enumerate(zip(expected, got, strict=True)):
        if not torch.allclose(e, g, rtol=1e-9, atol=1e-9, equal_nan=True):
            found["difference"] += f" value {index} differs by {(e - g).abs().max()}"
    return found


def _check(world_size: int, train: bool, count: int, length: int, cancel: bool) -> None:
    drawn = Counter[str]()
    chosen = [passes for passes in PASSES if ("cancel" in passes) == cancel]
    variants = [variant for variant in VARIANTS if variant.get("backend") != "aot_eager"]  # the passes are Inductor's

    @settings(SETTINGS, max_examples=count)
    @given(steps=programs(world_size, length, FOR_CANCEL if cancel else FOR_MERGE))
    def check(steps: list[Step]) -> None:
        number = drawn["programs"]
        drawn["programs"] += 1
        passes, variant = chosen[number % len(chosen)], variants[number % len(variants)]
        results = Ranks.get(world_size).run(_both_ways, steps, passes, variant, train, deadline_s=400)
        differences = {rank: result["difference"] for rank, result in enumerate(results) if result["difference"]}
        assert not differences, f"{steps} with {passes} compiled with {variant}: {differences}"
        assert all(result["calls"] == results[0]["calls"] for result in results), (steps, passes)
        drawn.update(results[0]["counts"])

    check()
    # So that a change to the drawing cannot quietly leave the passes nothing to do.
    assert drawn["programs"] >= count
    assert drawn["compiled"] < drawn["eager"]
    if cancel:
        assert drawn["cancelled"] > 0


@pytest.mark.parametrize("train", [pytest.param(False, marks=pytest.mark.slow), True], ids=["inference", "training"])
def test_random_programs_with_passes(train: bool) -> None:
    _check(2, train, 2, length=7, cancel=True)  # with merge and fused layout in turn


@pytest.mark.slow
@pytest.mark.parametrize("cancel", [False, True], ids=["merge", "cancel"])
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_many_random_programs_with_passes(world_size: int, train: bool, cancel: bool) -> None:
    count = int(os.environ.get("FVOPS_RANDOM_PROGRAMS", "200")) // 12 + 1
    _check(world_size, train, count, length=10, cancel=cancel)
