"""One command for a machine with an NVIDIA GPU: the GPU tests, then the bench of the kernels. ``make gpu-check``.

Needs a Python with torch >= 2.11, triton >= 3.6, numpy, pytest, hypothesis and setuptools, and no network. Each part
runs in a process of its own under a deadline, so that one that dies or hangs costs its own results only. Writes
``gpu-report.json`` and, where matplotlib is there, ``gpu-report.png``.

Exit code: 0 all passed; 1 something failed; 3 nothing was checked, for there is no CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Under eight minutes together, with what starting up takes.
_TESTS_S, _BENCH_S = 300.0, 120.0
# For pytest to end and write down its results after the deadline; then it is killed.
_GRACE_S = 15.0
# Of test files at a time, where pytest-xdist is there: most of the time goes into starting processes.
_PROCESSES = 6
_SKIPPED = "skipped: no CUDA device"
NO_DEVICE = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("gpu-report.json"))
    parser.add_argument("--png", type=Path, default=Path("gpu-report.png"))
    parser.add_argument("--tests-s", type=float, default=_TESTS_S, help="deadline of the tests, seconds")
    parser.add_argument("--bench-s", type=float, default=_BENCH_S, help="deadline of the bench, seconds")
    parser.add_argument("--no-install", action="store_true", help="fail rather than pip install this tree")
    arguments = parser.parse_args()
    if not install(not arguments.no_install):
        return 1
    import torch

    from tools import gpu_report

    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": gpu_report.machine(ROOT),
        "tests": [],
        "bench": [],
        "failures": [],
    }
    run_tests(report, arguments.tests_s)
    if torch.cuda.is_available():
        run_bench(report, arguments.bench_s)
        if report["bench"] and not gpu_report.plot(report, arguments.png):
            print("no picture: matplotlib is not installed")
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(gpu_report.table(report))
    return verdict(report)


def verdict(report: dict[str, Any]) -> int:
    """The exit code, see above; says so where nothing was checked."""
    if report["failures"]:
        return 1
    if report["machine"]["device"] is None:
        print(_SKIPPED)
        return NO_DEVICE
    return 0


def install(allowed: bool) -> bool:
    """Have ``fvops.kernels`` of this tree importable: its folder is not below fvops', so it takes an installation.

    Args:
        allowed: may pip be called?
    """
    found = installed_kernels()
    if found.startswith(str(ROOT)):
        return True
    if not allowed:
        print(f"fvops.kernels of {ROOT} is not what {sys.executable} imports: {found or 'nothing'}")
        return False
    print("== installing fvops from this tree, without its dependencies and without a network")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        print(run.stdout, run.stderr, sep="\n")
        print(
            f"cannot install fvops for {sys.executable}; pip needs setuptools >= 77 and may need a virtual environment"
        )
        return False
    # What an editable installation adds is set up when Python starts: go on in a new one.
    os.execv(sys.executable, [sys.executable, *sys.argv, "--no-install"])


def installed_kernels() -> str:
    """Where a new Python finds fvops.kernels; empty where it does not, as in a tree that is not installed."""
    code = "import fvops.kernels; print(fvops.kernels.__file__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else ""


def run_tests(report: dict[str, Any], deadline_s: float) -> None:
    """pytest -m gpu; its tests, and what failed, are added to the report."""
    from tools.gpu_report import read_junit

    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        files = sorted(str(path) for path in (ROOT / "tests").glob("test_gpu_*.py"))
        together = importlib.util.find_spec("xdist") is not None
        shared = ["-n", str(_PROCESSES), "--dist", "loadfile"] if together else []
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", *shared, f"--junitxml={junit}", *files]
        problem = bounded(command, deadline_s)
        report["tests"] = read_junit(junit)
    bad = [f"{test['name']}: {test['outcome']}" for test in report["tests"] if test["outcome"] in ("failed", "error")]
    report["failures"] += bad
    if problem is not None and not bad:
        report["failures"].append(f"pytest {problem}")
    if not report["tests"]:
        report["failures"].append("pytest left no results")


def run_bench(report: dict[str, Any], deadline_s: float) -> None:
    """The bench, in a process of its own; its rows, and what failed, are added to the report."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"
        problem = bounded([sys.executable, "-m", "tools.gpu_bench", "--json", str(path)], deadline_s)
        if path.exists():
            found = json.loads(path.read_text())
            report["bench"], report["block_shapes"] = found["rows"], found["block_shapes"]
            report["failures"] += found["failures"]
    if problem is not None:
        report["failures"].append(f"the bench {problem}")


def bounded(command: list[str], deadline_s: float) -> str | None:
    """Run `command` in the tree with its output shown; None when it succeeded, else how it ended.

    Past the deadline it is interrupted; a little later it and its children are killed.
    """
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(deadline_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"was not done after {deadline_s:g} s"
    return None if code == 0 else f"ended with exit code {code}"


if __name__ == "__main__":
    raise SystemExit(main())
