"""fvops.doctor: what it says, and that its exit code tells."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fvops import doctor
from tests.harness import Ranks

ROOT = Path(__file__).parents[1]
MODULE, TOOL = ["-m", "fvops.doctor"], [str(ROOT / "tools/doctor.py")]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]


def _doctor(arguments: list[str], **variables: str) -> tuple[int, str]:
    """The exit code and the output of a process of its own."""
    without = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in without}
    run = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        # Two ranks, however many GPUs there are.
        env={**inherited, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
    )
    return run.returncode, run.stdout


@pytest.mark.parametrize(
    ("arguments", "ranks"),
    [(MODULE, 1), pytest.param(TOOL, 1, marks=pytest.mark.slow), ([*TORCHRUN, *MODULE], 2)],
    ids=["python -m", "tools/doctor.py", "torchrun"],
)
def test_this_machine_is_well(arguments: list[str], ranks: int) -> None:
    code, text = _doctor(arguments)
    assert code == 0, text
    assert f"fvops doctor, rank 0 of {ranks}" in text
    assert "rank 1" not in text
    assert torch.__version__ in text
    assert "group sp:0             2 on cpu; shared memory: " in text
    assert "values are right" in text
    assert "GB/s a rank" in text
    assert "!!" not in text
    assert text.rstrip().endswith("all is well")


def test_an_exchange_that_fails_is_a_problem() -> None:
    code, text = _doctor(MODULE, FVOPS_TRANSPORT="carrier pigeon")
    assert code == 1, text
    assert "carrier pigeon" in text
    assert "!!  exchange               failed on rank 0  <- " in text
    assert text.rstrip().endswith("problem(s), marked !!")


def test_a_rank_that_dies_is_a_problem(tmp_path: Path) -> None:
    """A module that ends whoever is rank 1, found before any other of its name."""
    (tmp_path / "sitecustomize.py").write_text("import os\nif os.environ.get('RANK') == '1':\n    os._exit(7)\n")
    code, text = _doctor(MODULE, PYTHONPATH=f"{tmp_path}:{ROOT}", FVOPS_TIMEOUT_S="5")
    assert code == 1, text
    assert "rank 1 of 2 ended with exit code 7  <- it said nothing" in text
    assert "rank 1 did not come, says rank 0" in text


def test_one_that_is_not_done_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(doctor, "_ALL_S", 0.1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # else more is said where there is one GPU
    report = doctor.Report()
    doctor.examine_here(report)
    assert report.problems == 2
    assert "rank 1 of 2 is not done  <- it was stopped after 0.1 s" in report.lines[1]


def test_a_missing_library_is_a_problem_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FVOPS_TRANSPORT", "hccl")
    monkeypatch.setenv("FVOPS_HCCL_LIBRARY", "/nowhere/libhccl.so")
    assert doctor.main(["--no-exchange"]) == 1
    text = capsys.readouterr().out
    assert "!!  HCCL" in text
    assert "/nowhere/libhccl.so" in text
    assert "not tried, as asked" in text
    assert "1 problem" in text


def _examine() -> tuple[list[str], int]:
    report = doctor.Report()
    doctor.examine_exchange(report)
    return report.lines, report.problems


def test_the_exchange_is_tried_over_all_ranks(ranks: Ranks) -> None:
    for lines, problems in ranks.run(_examine):
        assert problems == 0
        text = "\n".join(lines)
        assert f"group sp:0             {ranks.world_size} on cpu; " in lines[0]
        assert all(f"group {name}:0" in text for name in ("world", "node", "tp"))
        assert "values are right" in text
        assert "GB/s" in lines[-1]


def _examine_over_gloo() -> list[str]:
    import fvops

    fvops.destroy_model_parallel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FVOPS_TRANSPORT", "process_group")
        fvops.initialize_model_parallel(1, fvops.get_world_size())
        lines, _ = _examine()
    fvops.destroy_model_parallel()
    return lines


def test_it_says_why_a_group_has_its_transport(two_ranks: Ranks) -> None:
    (first, *_), _ = two_ranks.run(_examine_over_gloo)
    assert first.endswith("FVOPS_TRANSPORT=process_group")
