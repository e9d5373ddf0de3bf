"""`tools/gpu_check.py` without a GPU: its report, its bench on CPU tensors, its deadlines and what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import reference
from tools import gpu_bench, gpu_check, gpu_report
from tools.gpu_bench import COPY, FASTVIDEO, FVOPS, TORCH, WORK

JUNIT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.test_gpu_nccl" name="test_a" time="0.5"/>
<testcase classname="tests.test_gpu_nccl" name="test_b" time="1"><failure message="no">trace</failure></testcase>
<testcase classname="tests.test_gpu_nccl" name="test_c" time="0"><skipped message="no device">x</skipped></testcase>
<testcase classname="tests.test_gpu_nccl" name="test_d" time="0"><error message="setup">trace</error></testcase>
</testsuite></testsuites>"""


def _row(model: str, work: str, share: float) -> dict[str, Any]:
    names = (COPY, FVOPS, TORCH, FASTVIDEO)
    shares = dict(zip(names, (1.0, share, share / 2, share / 3), strict=True))
    return {"model": model, "work": work, "bytes": 25e6, "gb_per_s": dict.fromkeys(names, 2000.0), "share": shares}


def _report(**changes: Any) -> dict[str, Any]:
    machine = {"device": "Made-up GPU", "torch": "2.13.0", "triton": "3.7.1", "commit": "abc"}
    bench = [_row(model, work, 0.9) for model in gpu_bench.MODELS for work in WORK]
    tests = [{"name": "n", "outcome": "passed"}, {"name": "m", "outcome": "skipped"}]
    return {"machine": machine, "tests": tests, "bench": bench, "failures": [], **changes}


def test_junit_is_read_and_a_missing_or_torn_file_is_nothing(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    assert gpu_report.read_junit(path) == []
    path.write_text(JUNIT[:150])
    assert gpu_report.read_junit(path) == []
    path.write_text(JUNIT)
    tests = gpu_report.read_junit(path)
    assert [test["outcome"] for test in tests] == ["passed", "failed", "skipped", "error"]
    assert tests[1]["name"] == "test_gpu_nccl::test_b"
    assert tests[1]["why"] == "no\ntrace"
    assert "why" not in tests[0]


def test_the_table_shows_counts_shares_and_failures() -> None:
    text = gpu_report.table(_report(failures=["test_b: failed"]))
    assert "Made-up GPU" in text
    assert "tests: 1 passed, 0 failed, 1 skipped" in text
    assert text.splitlines()[-1] == "FAILED test_b: failed"
    rows = [line for line in text.splitlines() if line.startswith("HunyuanVideo 720p, pack (2,1)")]
    assert [field for field in rows[0].split() if field.endswith("%")] == ["90%", "45%", "30%"]
    assert max(map(len, text.splitlines())) <= 150


def test_the_exit_code_tells_failed_from_nothing_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.verdict(_report()) == 0
    assert gpu_check.verdict(_report(failures=["x"])) == 1
    nothing = _report(machine={"device": None}, bench=[])
    assert gpu_check.verdict(nothing) == gpu_check.NO_DEVICE == 3
    assert capsys.readouterr().out == "skipped: no CUDA device\n"
    assert gpu_check.verdict({**nothing, "failures": ["x"]}) == 1


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "report.png"
    assert gpu_report.plot(_report(), path)
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report.importlib.util, "find_spec", lambda name: None)
    assert not gpu_report.plot(_report(), tmp_path / "report.png")


def test_the_bench_gives_every_row_and_survives_one_that_fails() -> None:
    models = {"small": (16, 8, 4), "odd heads": (16, 6, 4)}
    rows, failures = gpu_bench.bench(torch.device("cpu"), models, rounds=2, flush_bytes=64)
    assert [(row["model"], row["work"]) for row in rows] == [("small", work) for work in WORK]
    for row, tensors in zip(rows, (1, 1, 3), strict=True):
        assert row["bytes"] == tensors * 4 * 8 * 4 * 2
        assert set(row["share"]) == {COPY, FVOPS, TORCH, FASTVIDEO}
        assert row["share"][COPY] == 1.0
        assert all(seconds > 0 for seconds in row["us"].values())
    assert [text.split(":")[0] for text in failures] == [f"odd heads, {work}" for work in WORK]
    gpu_report.table(_report(bench=rows, failures=failures))


def test_the_candidates_move_the_same_elements() -> None:
    for work in (WORK[0], WORK[2]):
        calls = gpu_bench.candidates(work, 5, 8, 4, 4, torch.device("cpu"))
        assert all(map(torch.equal, calls[FVOPS](), calls[TORCH]()))


def test_fastvideos_copies_are_those_of_the_exchange() -> None:
    """Around a plain exchange of parts they give what `all_to_all_4D` is defined as, also with q, k, v joined."""
    P = 4
    for dims in ((2, 1), (1, 2)):
        inputs = [[torch.randn(1, 2 * P, 2 * P, 3) for _ in range(3)] for _ in range(P)]
        joined = [torch.cat(three) for three in inputs]
        out = dims == (2, 1)
        sends = [gpu_bench.fastvideo_pack_heads(three, P) for three in inputs] if out else []
        sends = sends or [gpu_bench.fastvideo_pack_rows(x, P) for x in joined]
        received = [torch.stack([sends[j][r] for j in range(P)]) for r in range(P)]
        unpack = gpu_bench.fastvideo_unpack_rows if out else gpu_bench.fastvideo_unpack_heads
        for y, wanted in zip(map(unpack, received), reference.all_to_all_4D(joined, *dims), strict=True):
            assert torch.equal(y, wanted), dims


def test_a_tree_that_is_not_installed_has_no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_check.installed_kernels() == str(gpu_check.ROOT / "kernels" / "__init__.py")
    (tmp_path / "fvops").mkdir()
    (tmp_path / "fvops" / "__init__.py").write_text("from fvops.kernels import layout\n")
    bare = tmp_path / "python"  # without what is installed
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)  # whose folder is the first place that Python looks in
    assert gpu_check.installed_kernels() == ""
    assert not gpu_check.install(allowed=False)


def test_a_part_that_hangs_or_dies_is_told_from_one_that_succeeds() -> None:
    assert gpu_check.bounded([sys.executable, "-c", "pass"], 60) is None
    assert gpu_check.bounded([sys.executable, "-c", "raise SystemExit(4)"], 60) == "ended with exit code 4"
    hangs = [sys.executable, "-c", "import signal; signal.pause()"]
    assert gpu_check.bounded(hangs, 0.5) == "was not done after 0.5 s"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_whole_command_without_a_gpu(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "tools/gpu_check.py", "--json", str(report), "--no-install"]
    run = subprocess.run(command, cwd=gpu_check.ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 3, run.stdout + run.stderr
    assert run.stdout.endswith("skipped: no CUDA device\n")
    tests = json.loads(report.read_text())["tests"]
    assert len(tests) > 50
    assert {test["outcome"] for test in tests} == {"skipped"}
    assert all("no CUDA device" in test["why"] for test in tests)
