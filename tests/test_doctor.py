"""fvops.doctor: what it says, and that its exit code tells."""

from __future__ import annotations

import pytest
import torch

from fvops import doctor
from tests.harness import Ranks


def test_this_machine_is_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert doctor.main() == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert "not tried: one process" in text
    assert text.rstrip().endswith("all is well")


def test_a_missing_library_is_a_problem_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FVOPS_TRANSPORT", "hccl")
    monkeypatch.setenv("FVOPS_HCCL_LIBRARY", "/nowhere/libhccl.so")
    assert doctor.main() == 1
    text = capsys.readouterr().out
    assert "!!  HCCL" in text
    assert "/nowhere/libhccl.so" in text
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
