"""What a check finds different, and the table and the matrix that are made of it; no processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvops.debug.fingerprint import Fingerprint, difference, difference_of_message, table
from tests.draws import profile
from tests.fault_table import cells
from tools.reliability_matrix import circumstances, matrix, outcomes


def _print(**changes: Any) -> Fingerprint:
    fields: dict[str, Any] = {
        "group": "sp:0",
        "op": "all_gather",
        "number": 3,
        "shapes": [[2, 3]],
        "dtypes": ["float32"],
    }
    return Fingerprint(**(fields | {"arguments": {"dim": 1}, "where": "a.py:1 in f"} | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"where": "b.py:2 in g"}, ""),
        ({"number": 9}, ""),
        ({"op": "barrier", "shapes": [], "dtypes": [], "arguments": {}}, "ops"),
        ({"shapes": [[3, 2]]}, "shapes"),
        ({"shapes": [[2, 3], [2, 3]], "dtypes": ["float32"] * 2}, "dtypes"),
        ({"dtypes": ["float16"]}, "dtypes"),
        ({"arguments": {"dim": 0}}, "arguments"),
    ],
)
def test_what_must_agree(changes: dict[str, Any], words: str) -> None:
    prints = [_print(), _print(), _print(**changes)]
    found = difference(prints)
    assert found == (words and f"the ranks' {words} differ")
    assert bool(difference(prints[::-1])) == bool(found)
    assert Fingerprint.decode(prints[2].encode()) == prints[2]


@given(data=st.data(), places=st.integers(2, 4))
@profile(60)
def test_split_sizes_agree_when_each_pair_of_ranks_does(data: st.DataObject, places: int) -> None:
    number = st.integers(0, 2)
    sent = [[data.draw(number) for _ in range(places)] for _ in range(places)]
    # Mostly the transpose, sometimes with one number that differs.
    expected = [[sent[j][i] for j in range(places)] for i in range(places)]
    if data.draw(st.booleans()):
        expected[data.draw(st.integers(0, places - 1))][data.draw(st.integers(0, places - 1))] += 1
    prints = [
        _print(
            op="all_to_all_single",
            shapes=[[sum(sent[i]), 5]],
            arguments={"input_split_sizes": sent[i], "output_split_sizes": expected[i]},
        )
        for i in range(places)
    ]
    wrong = [(i, j) for i in range(places) for j in range(places) if sent[i][j] != expected[j][i]]
    found = difference(prints)
    assert bool(found) == bool(wrong)
    if wrong:
        i, j = wrong[0]
        assert found.startswith(f"place {i} sends {sent[i][j]} rows to place {j}, which expects {expected[j][i]}")


def test_equal_parts_meet_split_sizes() -> None:
    none = {"input_split_sizes": None, "output_split_sizes": None}
    even = {"input_split_sizes": [2, 2], "output_split_sizes": [2, 2]}
    prints = [_print(op="all_to_all_single", shapes=[[4, 3]], arguments=arguments) for arguments in (none, even)]
    assert difference(prints) == ""
    prints[0] = _print(op="all_to_all_single", shapes=[[6, 3]], arguments=none)
    assert difference(prints) == "place 0 sends 3 rows to place 1, which expects 2"


def test_a_message_fits_by_its_elements_and_dtype() -> None:
    sent = _print(op="send", shapes=[[2, 3]])
    assert difference_of_message(sent, _print(op="recv", shapes=[[6]])) == ""
    assert "number of elements" in difference_of_message(sent, _print(op="recv", shapes=[[5]]))
    assert "dtypes" in difference_of_message(sent, _print(op="recv", shapes=[[6]], dtypes=["int32"]))


def test_what_nobody_wrote_is_refused() -> None:
    for text in ("", "[]", '{"op": 1}', "nonsense"):
        with pytest.raises(RuntimeError, match="unreadable"):
            Fingerprint.decode(text)


def test_the_table_stands_side_by_side() -> None:
    lines = table({1: _print(arguments={}), 0: _print(op="send"), 5: "has died"}).splitlines()
    assert [line.split("|")[0].strip() for line in lines] == ["rank", "0", "1", "5"]
    assert lines[3] == "  5    | has died"
    bars = [[at for at, letter in enumerate(line) if letter == "|"] for line in lines[:3]]
    assert bars[0] == bars[1] == bars[2]


def test_the_matrix_says_what_was_not_run(tmp_path: Path) -> None:
    names = [str(cell) for cell in cells()]
    file = tmp_path / "faults.xml"
    file.write_text(
        '<testsuites><testsuite timestamp="2026-01-02T03:04:05.6" time="150">'
        f'<testcase name="test_a_fault[{names[0]}]"/>'
        f'<testcase name="test_a_fault[{names[1]}]"><failure/></testcase>'
        '<testcase name="test_other"/></testsuite></testsuites>'
    )
    found = outcomes([str(file)])
    assert found == {names[0]: "ok", names[1]: "FAILED"}
    when = circumstances([str(file)])
    assert when.startswith("Run from 2026-01-02 03:04 on, in 2 minutes, with torch 2.")
    text = matrix(found, when)
    assert text.splitlines()[-1] == f"{len(names)} cells: 1 ok, 1 not ok, {len(names) - 2} not run. {when}"
    assert text.count("not run |") == len(names) - 2
    file.write_text("<testsuites/>")
    with pytest.raises(ValueError, match="holds no result"):
        outcomes([str(file)])
