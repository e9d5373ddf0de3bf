"""The notices of check_collectives that lie in a store: what no rank has written is refused, with whose it is."""

from __future__ import annotations

import contextlib
import json
import random
from typing import Any

import pytest
import torch.distributed as dist

from fvops.debug.board import Board
from fvops.debug.fingerprint import Fingerprint
from fvops.debug.processes import this_process
from fvops.debug.standstill import Notice, notice_key, seen_last
from tests.remains import resident_within
from tests.test_hostile_bytes import _MOST_RESIDENT, _mutated

_GOOD = Notice(
    Fingerprint("sp:0", "all_gather", 3, [[2, 3]], ["float32"], {"dim": 1}, "a.py:1 in f"),
    7,
    "call/7/collective/3",
    {1: 1, 5: 0},
    this_process(),
)


def _changed(**changes: Any) -> str:
    return json.dumps(json.loads(_GOOD.encode()) | changes)


_PRINT = json.loads(_GOOD.encode())["print_"]
_GARBAGE = [
    "",
    "no json",
    "\ufffd",
    "5",
    "null",
    "[]",
    "{}",
    "[" * 100_000,
    _changed(more=1),
    _changed(print_=None),
    _changed(print_=[]),
    _changed(print_=_PRINT | {"op": 5}),
    _changed(print_=_PRINT | {"shapes": [2]}),
    _changed(print_=_PRINT | {"dtypes": "float32"}),
    _changed(print_=_PRINT | {"arguments": []}),
    _changed(awaited=[1]),
    _changed(awaited={"x": 1}),
    _changed(awaited={"1": "1"}),
    _changed(process=5),
    _changed(process={"pid": "1", "start": "", "home": ""}),
    _changed(life="7"),
    _changed(call=None),
    _changed(over=1),
    _changed(failed=0),
]


@pytest.mark.parametrize("cases", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_changed_notices(cases: int) -> None:
    """As the board reads bytes: a notice, or the error that says whose it is."""
    draw, good, told = random.Random(cases), _GOOD.encode().encode(), []
    with resident_within(_MOST_RESIDENT):
        for _ in range(cases):
            text = _mutated(bytearray(good), draw).decode(errors="replace")
            try:
                Notice.decode(text, 2)
            except RuntimeError as error:
                told.append(str(error))
            with contextlib.suppress(RuntimeError):
                Fingerprint.decode(text)
    assert cases / 3 < len(told) <= cases
    assert all("global rank 2" in text for text in told)


def test_a_notice_survives() -> None:
    assert Notice.decode(_GOOD.encode(), 2) == _GOOD


@pytest.mark.parametrize("text", _GARBAGE, ids=lambda text: text[:20])
def test_garbage_is_refused_with_whose_it_is(text: str) -> None:
    with pytest.raises(
        RuntimeError, match=r"the notice that global rank 2 put up .*'last/2'.* is unreadable"
    ) as caught:
        Notice.decode(text, 2)
    assert type(caught.value) is RuntimeError


def test_bytes_that_are_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    store.set(f"fvops/check/{notice_key(2)}", b"\xff\xfe")
    with pytest.raises(RuntimeError, match="global rank 2 put up"):
        seen_last(Board(), 2)
