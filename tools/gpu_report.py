"""The report of `tools/gpu_check.py`: what a run of pytest left, the machine, a table for people, a picture."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

from tools.gpu_bench import COPY, FASTVIDEO, FVOPS, TORCH, WORK

__all__ = ["machine", "plot", "read_junit", "table"]

SHOWN = (FVOPS, TORCH, FASTVIDEO)


def read_junit(path: Path) -> list[dict[str, str]]:
    """Every test of pytest's JUnit file: name, outcome (passed, failed, error or skipped) and, unless passed, why.

    An empty list when there is no file, or it was cut off in the middle: the run that should have written it failed.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (FileNotFoundError, ElementTree.ParseError):
        return []
    tests = []
    for case in root.iter("testcase"):
        name = f"{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name', '')}"
        told = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if told is None else {"failure": "failed"}.get(told.tag, told.tag)
        test = {"name": name, "outcome": outcome, "seconds": case.get("time", "")}
        if told is not None:
            test["why"] = f"{told.get('message') or ''}\n{told.text or ''}".strip()[-4000:]
        tests.append(test)
    return tests


def machine(root: Path) -> dict[str, Any]:
    """The device with its driver, the versions, and the commit; ``"device": None`` without a GPU."""
    found: dict[str, Any] = {
        "device": None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "commit": _output("git", "-C", str(root), "describe", "--always", "--dirty"),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["memory_gb"] = round(properties.total_memory / 1e9, 1)
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        found["cuda"] = torch.version.cuda
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _output(*command: str) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({type(error).__name__})"
    return run.stdout.strip() if run.returncode == 0 else f"unknown ({run.stderr.strip()[:200]})"


def table(report: dict[str, Any]) -> str:
    """What ends up on stdout: tests, the share of the copy's speed by model and work, failures."""
    tests = report["tests"]
    counts = {outcome: sum(test["outcome"] == outcome for test in tests) for outcome in ("passed", "failed", "error")}
    skipped = sum(test["outcome"] == "skipped" for test in tests)
    lines = [
        f"{report['machine']['device'] or 'no CUDA device'}; torch {report['machine']['torch']}, "
        f"triton {report['machine']['triton']}, commit {report['machine']['commit']}",
        f"tests: {counts['passed']} passed, {counts['failed'] + counts['error']} failed, {skipped} skipped",
    ]
    if report["bench"]:
        lines += ["", f"share of the device's copy bandwidth{'':9} MB  copy GB/s" + "".join(f"{n:>26}" for n in SHOWN)]
    for row in report["bench"]:
        shares = "".join(f"{100 * row['share'][name]:25.0f}%" for name in SHOWN)
        label = f"{row['model']}, {row['work']}"
        lines.append(f"{label:<41}{row['bytes'] / 1e6:6.0f}{row['gb_per_s'][COPY]:11.0f}{shares}")
    if report.get("block_shapes"):
        lines += ["", "share of the copy bandwidth by block shape, elements x warps of a program"]
    for row in report.get("block_shapes", []):
        shares = "".join(f"  {name}: {100 * share:.0f}%" for name, share in row["share"].items() if name != COPY)
        lines.append(f"{row['model']}, {row['work']}:{shares}")
    lines += ["", *(f"FAILED {failure}" for failure in report["failures"])] if report["failures"] else []
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> bool:
    """Bars of the shares, a panel for each piece of work, the copy as a line at 100 %; False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(WORK), 1, figsize=(11, 3.8 * len(WORK)))
    for panel, work in zip(panels, WORK, strict=True):
        rows = [row for row in report["bench"] if row["work"] == work]
        for i, name in enumerate(SHOWN):
            at = [index + (i - 1) * 0.27 for index in range(len(rows))]
            bars = panel.bar(at, [100 * row["share"][name] for row in rows], 0.25, label=name)
            panel.bar_label(bars, fmt="%.0f", fontsize=8)
        panel.axhline(100, color="black", linewidth=1, linestyle="--")
        panel.set(title=work, ylabel="% of copy bandwidth", ylim=(0, 125))
        panel.set_xticks(range(len(rows)), [row["model"] for row in rows], rotation=20, ha="right")
    panels[0].legend(loc="upper right", ncols=len(SHOWN), fontsize=8)
    of = report["machine"]
    figure.suptitle(f"{of['device']}, torch {of['torch']}, triton {of['triton']}; dashed: dst.copy_(src) of the bytes")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
