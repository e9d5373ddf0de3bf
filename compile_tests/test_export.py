"""Promise 8: an exported program, and an AOTInductor package, run in new processes with the same results and calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import fvops
from compile_tests.programs import TOLERANCE
from fvops.debug import canonical, record_collectives
from tests.harness import Ranks

SHAPE = (1, 6, 4, 5)


class _Block(torch.nn.Module):
    """Exchanges, an unused result, and a send/recv chain around a little arithmetic."""

    def forward(self, x: Tensor) -> Tensor:
        group = fvops.get_sp_group()
        whole = group.all_to_all_4D(x.sin(), 2, 1)
        group.all_reduce(x)
        group.send(x)
        other = group.recv(SHAPE, torch.float32)
        group.barrier()
        back = group.all_to_all_4D(whole * whole.mean(dim=1, keepdim=True), 1, 2)
        return group.all_gather(back + other, 1)


def _example() -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(fvops.get_world_rank()))


def _eager() -> tuple[Tensor, list[tuple[str, str, int]]]:
    with torch.no_grad(), record_collectives() as records:
        return _Block()(_example()), canonical(records)


def _file(folder: str, ending: str) -> str:
    return f"{folder}/rank{fvops.get_world_rank()}.{ending}"


def _save(folder: str, packaged: bool) -> None:
    with torch.no_grad():
        program = torch.export.export(_Block(), (_example(),))
        if packaged:
            torch._inductor.aoti_compile_and_package(program, package_path=_file(folder, "aoti.pt2"))
        else:
            torch.export.save(program, _file(folder, "export.pt2"))


def _load_and_run(folder: str, packaged: bool) -> tuple[Tensor, list[tuple[str, str, int]]]:
    if packaged:
        loaded = torch._inductor.aoti_load_package(_file(folder, "aoti.pt2"))
    else:
        loaded = torch.export.load(_file(folder, "export.pt2")).module()
    with torch.no_grad(), record_collectives() as records:
        result = loaded(_example())
    return result, canonical(records)


@pytest.mark.parametrize("packaged", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["export", "AOTInductor"])
def test_a_saved_program_runs_in_new_processes(tmp_path: Path, packaged: bool) -> None:
    expected = Ranks.get(2).run(_eager)
    Ranks.get(2).run(_save, str(tmp_path), packaged, deadline_s=240)
    Ranks.get(2).kill()
    got = Ranks.get(2).run(_load_and_run, str(tmp_path), packaged, deadline_s=180)
    for (result, records), (expected_result, expected_records) in zip(got, expected, strict=True):
        torch.testing.assert_close(result, expected_result, **TOLERANCE)
        assert records == expected_records
