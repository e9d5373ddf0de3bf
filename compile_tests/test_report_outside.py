"""fvops.report of programs that Dynamo leaves to Python in parts: what runs outside of graphs, how often graphs run."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fvops
from fvops.graph_report import Report, planned_groups
from tests.harness import Ranks


def _exchange(x: Tensor) -> Tensor:
    return fvops.get_sp_group().all_to_all_4D(x, 2, 1)


def _back(x: Tensor) -> Tensor:
    return fvops.get_sp_group().all_to_all_4D(x, 1, 2)


def _printing(x: Tensor) -> Tensor:
    """A break in a loop: Dynamo leaves the whole frame to Python, and compiles what that calls."""
    for _ in range(3):
        x = _back(_exchange(x).sin())
        print("on the way")
    return x


@torch.compiler.disable
def _hidden(x: Tensor) -> Tensor:
    return _exchange(x)


def _with_a_hidden_part(x: Tensor) -> Tensor:
    return _back(_hidden(_exchange(x.sin()).view_as(x).contiguous()))


def _in_json(x: Tensor) -> Tensor:
    json.dumps({"tokens": x.size(1)})
    return _exchange(x)


def _of_planned(function: Callable[[Tensor], Tensor]) -> Report:
    with planned_groups(sp_size=2):
        return fvops.report(function, torch.empty(1, 4, 4, 8))


def _of_real(name: str) -> Report:
    return fvops.report(globals()[name], torch.rand(1, 4, 4, 8))


def _runs_and_outside(report: Report) -> tuple[int, list[tuple[str, str]], list[str]]:
    """Collectives that the graphs' runs have issued, those outside, and the user's functions that hold the former."""
    issued = sum(graph.runs * len(graph.collectives) for graph in report.graphs)
    holders = [kernel.where.rpartition(" in ")[2] for graph in report.graphs for kernel in graph.collectives]
    return issued, [(one.op, one.where.rpartition(" in ")[2]) for one in report.outside], holders


EXPECTED = {
    "_printing": (6, [], ["_exchange", "_back"]),
    "_with_a_hidden_part": (2, [("all_to_all_4D", "_exchange")], ["_exchange", "_back"]),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_collective_is_told(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = _of_planned(globals()[name])
    assert _runs_and_outside(report) == EXPECTED[name]
    text, page = report.text(), report.html()
    for one in report.outside:
        assert f"outside of graphs: 1 x all_to_all_4D on {one.group!r}, at {one.where}" in text
        assert one.where in page
    assert ("OUTSIDE of graphs" in report.summary()) == bool(report.outside)
    assert ("run 3 times" in text) == ("run 3 times" in page) == (name == "_printing")


def test_the_same_on_real_ranks(two_ranks: Ranks) -> None:
    for name, expected in EXPECTED.items():
        for report in two_ranks.run(_of_real, name, deadline_s=100):
            assert _runs_and_outside(report) == expected


def test_a_plain_program_has_none() -> None:
    report = _of_planned(lambda x: _back(_exchange(x).sin()))
    assert _runs_and_outside(report) == (2, [], ["_exchange", "_back"])
    assert "graphs:" not in report.summary()


def test_a_break_inside_python_s_library_is_told_at_the_user_s_line() -> None:
    """With what Dynamo stopped at, and without its names for the rest of a function."""
    report = _of_planned(_in_json)
    assert [found.where.rpartition(" in ")[2] for found in report.breaks] == ["_in_json"]
    assert [kernel.where.rpartition(" in ")[2] for kernel in report.graphs[-1].collectives] == ["_exchange"]
    [found] = _of_planned(_printing_once).breaks
    assert "print" in found.reason


def _printing_once(x: Tensor) -> Tensor:
    print("on the way")
    return _exchange(x)
