"""The fault matrix: every surviving rank is told the right thing in time, nothing remains, and it can start over."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest

from tests.fault_run import DEADLINE_S, suffer
from tests.fault_table import QUICK, Cell, cells
from tests.harness import RankFailure, Ranks

# Over the deadline: the roll call's two seconds, and a machine that is busy with four ranks on two cores.
_LEEWAY_S = 10.0


def _parameters() -> list[object]:
    found = [pytest.param(cell, id=str(cell), marks=() if str(cell) in QUICK else pytest.mark.slow) for cell in cells()]
    unknown = QUICK - {str(cell) for cell in cells()}
    assert not unknown, f"there are no such cells: {unknown}"
    return list(found)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("cell", _parameters())
def test_a_fault(cell: Cell, tmp_path: Path) -> None:
    fault, P = cell.fault, cell.world_size
    culprit = fault.culprit(P)
    ranks = Ranks.get(P, cell.transport)
    job = (suffer, fault.name, cell.mode, str(tmp_path), _free_port())
    if fault.dies:
        with pytest.raises(RankFailure, match="exit code -9") as caught:
            ranks.run(*job, initialize=False, deadline_s=90, grace_s=60)
        assert "raised" not in str(caught.value).split("--- rank")[0], caught.value
    else:
        ranks.run(*job, initialize=False, deadline_s=90)
    for rank in range(P):
        if rank == culprit and fault.dies:
            continue
        assert (tmp_path / str(rank)).exists(), f"rank {rank} told nothing:\n{caught.value if fault.dies else ''}"
        story = json.loads((tmp_path / str(rank)).read_text())
        if rank != culprit or fault.checked or fault.act == "full":
            assert re.search(fault.says.replace("{culprit}", str(culprit)), story["error"], re.DOTALL), story["error"]
            assert story["seconds"] < DEADLINE_S + _LEEWAY_S
        elif fault.act == "late":
            assert re.match(r"fvops\.\w+ on group 'brief:0'", story["error"]), story["error"]
        assert story["again"] == P - fault.dies
        assert story["held"][0] == story["held"][1]
