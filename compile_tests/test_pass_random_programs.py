"""Random programs under every combination of passes: values as eager's, the sequences that the passes promise."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import fvops
from compile_tests.random_programs import FOR_ALIKE, FOR_ANY, Step, first_value, programs, run, run_steps
from compile_tests.test_random_programs import QUICK_VARIANTS, SETTINGS, VARIANTS
from fvops.compiler import pass_log
from fvops.compiler.switches import MERGE_BYTES
from fvops.debug import CollectiveRecord
from fvops.device_communicators.base_device_communicator import DeviceCommunicatorBase
from tests.harness import Ranks

# A group, an op and one tensor's shape, with the op's arguments: exchanges of several tensors are taken apart.
Sent = tuple[str, str, tuple[int, ...], tuple[Any, ...]]

# Every combination, the fullest first.
PASSES: list[dict[str, Any]] = [
    {"layout": layout, "merge": merge, "cancel": cancel, "overlap": overlap, "dead": dead, "absorb": absorb}
    for layout, merge, cancel, overlap, absorb, dead in product(
        ("fused", "auto"), (True, 2048, False), (True, False), (True, 4096, False), (True, False), (True, False)
    )
]
RUNS = [(world_size, train) for world_size in (2, 3, 4) for train in (False, True)]  # of the slow test
# Added to each program, so that none of the passes can happen to have nothing to do.
ALWAYS_IN_ANY: list[Step] = [
    ("three", 0, "sp", 2, 1),
    ("project", 0, "sp"),
    ("project_received", 0, "sp"),
    ("project_sent", 0, "sp"),
]
ALWAYS_IN_ALIKE: list[Step] = [
    ("round_trip", 0, "sp", 2, 1),
    ("round_trip_of_lists", 0, "tp", 2, 1),
    ("unread", 0, "tp", 2, 1),
    *ALWAYS_IN_ANY,
]
# What `cancel` and `dead` may drop.
_EXCHANGES = {"all_to_all_4D", "all_to_all_4D_coalesced"}
DROPPED = {"cancel": _EXCHANGES, "dead": {*_EXCHANGES, "all_gather"}}


def _combinations(alike: bool) -> list[dict[str, Any]]:
    """`alike`: those for programs whose ranks do the same."""
    return [passes for passes in PASSES if (passes["cancel"] or passes["dead"]) == alike]


def _numbers(programs: int, world_size: int, train: bool, alike: bool) -> range:
    """Of the programs of one run of the slow test; each run goes on in the combinations where the one before ended."""
    count = programs * len(_combinations(alike)) // (len(PASSES) * len(RUNS)) + 1
    first = count * RUNS.index((world_size, train))
    return range(first, first + count)


def _taken_apart(records: list[CollectiveRecord]) -> list[Sent]:
    return [
        (record.group, record.op.removesuffix("_coalesced"), shape, record.arguments)
        for record in records
        for shape in record.shapes or ((),)
    ]


def _missing(eager: list[Any], compiled: list[Any]) -> list[Any] | None:
    """What has to be left out of `eager` to get `compiled`; None where that is not enough."""
    rest, missing = list(compiled), []
    for sent in eager:
        if rest and rest[0] == sent:
            rest.pop(0)
        else:
            missing.append(sent)
    return None if rest else missing


@contextmanager
def _counting_starts() -> Iterator[list[str]]:
    """The forms of the exchanges that are started and waited for later."""
    starts: list[str] = []
    plain = DeviceCommunicatorBase.start_all_to_all_4D

    def start(self: Any, inputs: Any, scatter_dim: int, gather_dim: int, form: str) -> Any:
        starts.append(form)
        return plain(self, inputs, scatter_dim, gather_dim, form)

    DeviceCommunicatorBase.start_all_to_all_4D = start  # type: ignore[method-assign]
    try:
        yield starts
    finally:
        DeviceCommunicatorBase.start_all_to_all_4D = plain  # type: ignore[method-assign]


def _broken_promise(eager: list[CollectiveRecord], compiled: list[CollectiveRecord], passes: dict[str, Any]) -> str:
    """What is wrong with the compiled sequence, "" if it is as the passes promise."""
    may_go = {op for name, ops in DROPPED.items() if passes[name] for op in ops}
    if not passes["merge"]:
        gone = _missing(eager, compiled)  # whole calls: none may be written as another
        if gone is None:
            return f"without merge eager issued {eager}, compiled issued {compiled}"
        return "" if {record.op for record in gone} <= may_go else f"dropped {gone}"
    missing = _missing(_taken_apart(eager), _taken_apart(compiled))
    if missing is None:
        return f"eager sent {eager}, compiled sent {compiled}"
    if not {op for _, op, _, _ in missing} <= may_go:
        return f"dropped {missing}"
    limit = MERGE_BYTES if passes["merge"] is True else passes["merge"]
    above = [record for record in compiled if record.op.endswith("_coalesced") and record.nbytes > limit]
    own = [record for record in above if record not in eager]  # a list of the program's own may be of any size
    return f"merged above {limit} bytes: {own}" if own else ""


def _both_ways(steps: list[Step], passes: dict[str, Any], variant: dict[str, Any], train: bool) -> dict[str, Any]:
    """What differs from eager, how many tensors were sent, in how many calls, and the calls themselves."""
    x = first_value()

    def program(x: Tensor) -> list[Tensor]:
        return run_steps(steps, x)[1:]

    expected, records = run(program, x, train)
    with fvops.compiler.enable(**passes), _counting_starts() as starts, pass_log() as notes:
        got, compiled_records = run(torch.compile(program, fullgraph=True, **variant), x, train)
    missing = _missing(_taken_apart(records), _taken_apart(compiled_records))
    found = {"calls": [(record.group, record.op) for record in compiled_records]}
    found["counts"] = {"eager": len(records), "compiled": len(compiled_records), "dropped": len(missing or ())}
    found["counts"]["split"] = len(starts)
    found["counts"]["absorbed"] = sum(note.name == "absorb" for note in notes)
    found["difference"] = _broken_promise(records, compiled_records, passes)
    if starts and not passes["overlap"]:
        found["difference"] = f"{len(starts)} exchanges were split"
    for index, (e, g) in enumerate(zip(expected, got, strict=True)):
        if not torch.allclose(e, g, rtol=1e-9, atol=1e-9, equal_nan=True):
            found["difference"] += f" value {index} differs by {(e - g).abs().max()}"
    return found


def _check(
    world_size: int,
    train: bool,
    count: int,
    length: int,
    alike: bool,
    variants: list[dict[str, Any]] = VARIANTS,
    first: int = 0,
) -> None:
    """`count` programs, the combinations of passes in turn."""
    drawn = Counter[str]()
    chosen = _combinations(alike)
    variants = [variant for variant in variants if variant.get("backend") != "aot_eager"]  # the passes are Inductor's

    @settings(SETTINGS, max_examples=count)
    @given(steps=programs(world_size, length, FOR_ALIKE if alike else FOR_ANY))
    def check(steps: list[Step]) -> None:
        number = first + drawn["programs"]
        drawn["programs"] += 1
        passes, variant = chosen[number % len(chosen)], variants[number % len(variants)]
        steps = [*steps, *(ALWAYS_IN_ALIKE if alike else ALWAYS_IN_ANY)]
        results = Ranks.get(world_size).run(_both_ways, steps, passes, variant, train, deadline_s=400)
        differences = {rank: result["difference"] for rank, result in enumerate(results) if result["difference"]}
        assert not differences, f"{steps} with {passes} compiled with {variant}: {differences}"
        assert all(result["calls"] == results[0]["calls"] for result in results), (steps, passes)
        drawn.update(results[0]["counts"])
        drawn["overlap without a small limit"] += passes["overlap"] is True
        drawn["merge without a small limit"] += passes["merge"] is True
        # H and D are symbols in a dynamic graph: nothing is absorbed then.
        opened_up = passes["layout"] == "fused" and not variant.get("dynamic")
        drawn["may absorb"] += passes["absorb"] and opened_up

    check()
    # So that a change to the drawing cannot quietly leave the passes nothing to do.
    assert drawn["programs"] >= count
    assert drawn["split"] > 0 or drawn["overlap without a small limit"] == 0
    assert drawn["absorbed"] > 0 or drawn["may absorb"] == 0
    assert drawn["compiled"] < drawn["eager"] or drawn["merge without a small limit"] == 0
    if alike:
        assert drawn["dropped"] > 0


@pytest.mark.parametrize("train", [pytest.param(False, marks=pytest.mark.slow), True], ids=["inference", "training"])
def test_random_programs_with_passes(train: bool) -> None:
    _check(2, train, 2, length=7, alike=True, variants=QUICK_VARIANTS[1:])  # with everything on


@pytest.mark.slow
@pytest.mark.parametrize("alike", [False, True], ids=["any", "alike"])
@pytest.mark.parametrize(("world_size", "train"), RUNS)
def test_many_random_programs_with_passes(world_size: int, train: bool, alike: bool) -> None:
    programs = int(os.environ.get("FVOPS_RANDOM_PROGRAMS", "200"))
    numbers = _numbers(programs, world_size, train, alike)
    _check(world_size, train, len(numbers), length=10, alike=alike, first=numbers.start)


@pytest.mark.parametrize("alike", [False, True], ids=["any", "alike"])
def test_every_combination_has_its_turn(alike: bool) -> None:
    """In the slow test, at the number of programs that `make test-slow` draws."""
    chosen = _combinations(alike)
    turns = [number for run in RUNS for number in _numbers(200, *run, alike)]
    assert {number % len(chosen) for number in turns} == set(range(len(chosen)))


def _exchange(*rows: int) -> CollectiveRecord:
    shapes = tuple((1, n, 2, 4) for n in rows)
    op = "all_to_all_4D" + ("_coalesced" if len(rows) > 1 else "")
    return CollectiveRecord("sp:0", op, shapes, torch.float64, (("scatter_dim", 2),), sum(rows) * 64)


def test_the_check_reports_broken_promises() -> None:
    """One tensor more or less, a merged one without merge, one above the limit."""
    off: dict[str, Any] = {"merge": False, "cancel": False, "dead": False}
    single, merged = [_exchange(4), _exchange(4)], [_exchange(4, 4)]
    assert not _broken_promise(single, single, off)
    assert "without merge" in _broken_promise(single, merged, off)
    assert "dropped" in _broken_promise(single, single[1:], off)
    assert not _broken_promise(single, single[1:], {**off, "dead": True})
    assert not _broken_promise(single, merged, {**off, "merge": 512})
    assert "above 511 bytes" in _broken_promise(single, merged, {**off, "merge": 511})
    assert not _broken_promise(merged, merged, {**off, "merge": 511})
    assert "eager sent" in _broken_promise(single, [*merged, _exchange(4)], {**off, "merge": True})
