"""Writes the fault matrix of docs/reliability.md from the results of `tests/test_faults.py`.

``pytest tests/test_faults.py --junit-xml=build/faults.xml``, then
``python -m tools.reliability_matrix build/faults.xml [more.xml ...]``. Results of several runs are put together, a
later one over an earlier; a cell that no file tells of says that it was not run.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

import torch

from tests.fault_table import FAULTS, MODES, TRANSPORTS, WORLDS, Cell, cells

__all__ = ["circumstances", "main", "matrix", "outcomes"]

_PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
_START, _END = "<!-- matrix: python -m tools.reliability_matrix -->", "<!-- end of the matrix -->"
_NO_CELL, _NOT_RUN = "-", "not run"


def outcomes(files: Sequence[str]) -> dict[str, str]:
    """By the cell's name: "ok", "FAILED" or "skipped".

    Raises:
        ValueError: a file holds no result of `tests/test_faults.py`.
    """
    found: dict[str, str] = {}
    for file in files:
        own = {}
        for case in ElementTree.parse(file).iter("testcase"):
            named = re.fullmatch(r"test_a_fault\[(.*)\]", case.get("name", ""))
            if named:
                own[named[1]] = _outcome(case)
        if not own:
            raise ValueError(f"{file} holds no result of tests/test_faults.py")
        found.update(own)
    return found


def circumstances(files: Sequence[str]) -> str:
    """When the results came about, how long that took, and with which torch."""
    suites = [suite for file in files for suite in ElementTree.parse(file).iter("testsuite")]
    began = sorted(suite.get("timestamp", "")[:16].replace("T", " ") for suite in suites)
    minutes = sum(float(suite.get("time", 0)) for suite in suites) / 60
    return (
        f"Run from {began[0]} on, in {minutes:.0f} minutes, with torch {torch.__version__} on {os.cpu_count()} cores."
    )


def _outcome(case: ElementTree.Element) -> str:
    kinds = {child.tag for child in case}
    return "FAILED" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "ok"


def matrix(found: Mapping[str, str], when: str) -> str:
    """The table: a row for each fault and world size, a column for each transport and mode; numbers, and `when`."""
    columns = [(transport, mode) for transport in TRANSPORTS for mode in MODES]
    lines = ["| fault | ranks | " + " | ".join(f"{_name(transport)}, {mode}" for transport, mode in columns) + " |"]
    lines.append("|---" * (2 + len(columns)) + "|")
    existing = {str(cell) for cell in cells()}
    for fault in FAULTS:
        for world_size in WORLDS:
            row = []
            for transport, mode in columns:
                name = str(Cell(fault, world_size, mode, transport))
                row.append(found.get(name, _NOT_RUN) if name in existing else _NO_CELL)
            lines.append(f"| {fault.name} | {world_size} | " + " | ".join(row) + " |")
    told = [found[name] for name in existing if name in found]
    lines.append("")
    lines.append(f"{len(existing)} cells: {told.count('ok')} ok, {len(told) - told.count('ok')} not ok, ")
    lines[-1] += f"{len(existing) - len(told)} not run. {when}"
    return "\n".join(lines)


def _name(transport: str) -> str:
    return {"process_group": "gloo", "nccl": "NCCL double", "hccl": "HCCL double"}.get(transport, transport)


def main(files: Sequence[str]) -> int:
    """Put the matrix into the page; 2 where no file is named."""
    if not files:
        print(__doc__, file=sys.stderr)
        return 2
    before, _, rest = _PAGE.read_text().partition(_START)
    _, _, after = rest.partition(_END)
    _PAGE.write_text(f"{before}{_START}\n\n{matrix(outcomes(files), circumstances(files))}\n\n{_END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
