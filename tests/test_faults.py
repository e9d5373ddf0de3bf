"""The fault matrix: every surviving rank is told the right thing in time, nothing remains, and it can start over."""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault_programs import DEADLINE_S
from tests.fault_run import serve_store, suffer
from tests.fault_table import FAULTS, MODES, QUICK, TRANSPORTS, WORLDS, Cell, cells
from tests.harness import RankFailure, Ranks, start_beside

# Over the deadline: the roll call's two seconds, and a machine that is busy with four ranks on two cores.
_LEEWAY_S = 10.0


def _parameters() -> list[object]:
    """All cells: `make test-slow` asks for those marked `fault`, `make test` for those not marked `slow`."""
    slow = {False: [pytest.mark.fault], True: [pytest.mark.fault, pytest.mark.slow]}
    return [pytest.param(cell, id=str(cell), marks=slow[str(cell) not in QUICK]) for cell in cells()]


def test_the_quick_cells_are_a_representative_tenth() -> None:
    everything = {str(cell): cell for cell in cells()}
    quick = [everything[name] for name in QUICK]
    assert len(everything) / 10 <= len(quick) <= len(everything) / 6
    assert {cell.fault.name for cell in quick} == {fault.name for fault in FAULTS}
    columns = {(transport, mode, P) for transport in TRANSPORTS for mode in MODES for P in WORLDS}
    assert {(cell.transport, cell.mode, cell.world_size) for cell in quick} == columns
    # Each kind of fault that all transports are put to is met on two of them at least, and at both world sizes.
    kinds: dict[str, set[tuple[str, int]]] = {}
    for cell in quick:
        if cell.fault.transports == TRANSPORTS:
            kind = "mismatch" if cell.fault.checked else cell.fault.act
            kinds.setdefault(kind, set()).add((cell.transport, cell.world_size))
    assert kinds.keys() >= {"kill", "stop", "raise", "late", "mismatch", "destroy", "server"}
    for kind, met in kinds.items():
        assert len({transport for transport, _ in met}) >= 2, kind
        assert {P for _, P in met} == set(WORLDS), kind


def test_the_page_has_all_rows() -> None:
    page = (Path(__file__).parents[1] / "docs" / "reliability.md").read_text()
    rows = [line.split(" | ")[:2] for line in page.splitlines() if re.match(r"\| .* \| \d \|", line)]
    assert rows == [[f"| {fault.name}", str(P)] for fault in FAULTS for P in WORLDS]


def test_make_test_slow_runs_all_cells() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    recipe = re.search(r"^test-slow:.*\n(?:\t.*\n)+", makefile, re.MULTILINE)
    assert recipe is not None
    assert '-m "slow or fault"' in recipe[0]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What one cell has compiled another finds here: compilation is not what is tested."""
    return str(tmp_path_factory.mktemp("compiled"))


def _free_port() -> int:
    """One that is free, and below those that Linux gives to who asks for any."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def _store_server(port: int, wanted: bool) -> Iterator[int]:
    """The pid of a process that serves a store at `port`; 0 where none is wanted."""
    if not wanted:
        yield 0
        return
    process = start_beside(serve_store, port)
    try:
        yield process.pid
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("cell", _parameters())
def test_a_fault(cell: Cell, tmp_path: Path, compiled: str) -> None:
    fault, P = cell.fault, cell.world_size
    culprit = fault.culprit(P)
    ranks = Ranks.get(P, cell.transport)
    port = _free_port()
    with _store_server(port, fault.served_apart) as server:
        job = (suffer, fault.name, cell.mode, str(tmp_path), port, server)
        log = ""
        if fault.dies:
            with pytest.raises(RankFailure, match="exit code -9") as caught:
                ranks.run(*job, initialize=False, cache=compiled, deadline_s=90, grace_s=60)
            log = str(caught.value)
            assert "raised" not in log.split("--- rank")[0], log
        else:
            ranks.run(*job, initialize=False, cache=compiled, deadline_s=90)
    for rank in range(P):
        if rank == culprit and fault.dies:
            continue
        assert (tmp_path / str(rank)).exists(), f"rank {rank} told nothing:\n{log}"
        story = json.loads((tmp_path / str(rank)).read_text())
        if fault.tells(rank, P):
            says = fault.says.replace("{culprit}", str(culprit))
            says = says.replace("{where}", r"\(compiled\)" if cell.mode == "compiled" else "")
            assert re.search(says, story["error"], re.DOTALL), story["error"]
            assert story["seconds"] < DEADLINE_S + _LEEWAY_S
        elif fault.act == "late":
            assert re.match(r"fvops\.\w+ on group 'brief:0'", story["error"]), story["error"]
        assert story["again"] == P - fault.dies
        assert story["held"][0] == story["held"][1]
        print(f"rank {rank}, {story['seconds']:.1f} s: {story['error']}")
