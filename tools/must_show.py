"""One Ulysses attention block by fvops, by diffusers and by FastVideo's layer, and what compiling costs: in one run.

    make bench-block                            # under ten minutes on 2 idle cores
    make bench-block BLOCK_ARGS="--json docs/measurements/block-2026-11-26.json --page"
    python -m tools.must_show --from docs/measurements/block-2026-11-26.json --page

Runs what `tools/bench_block.py` and `tools/bench_compile.py` measure, prints their tables, and says of each goal of
issue 6 whether it was met. ``--json`` keeps everything; ``--page`` writes the tables into docs/performance.md, between
two marks; ``--from`` measures nothing and takes a file that ``--json`` wrote. A missed goal is no error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from tools import bench_block, bench_compile
from tools.block_tables import compile_table, goals, goals_table, tables

__all__ = ["in_page", "main", "markdown"]

_ROOT = Path(__file__).resolve().parents[1]
_PAGE = _ROOT / "docs/performance.md"
_START, _END = "<!-- must show: python -m tools.must_show --from FILE --page -->", "<!-- end of must show -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench_block.add_arguments(parser)
    bench_compile.add_arguments(parser)
    parser.set_defaults(ways=["alone", "enabled"])
    parser.add_argument("--minutes", type=float, default=9.5, help="begin no compile round that would end later (9.5)")
    parser.add_argument("--json", metavar="FILE", help="keep everything in this file")
    parser.add_argument("--from", metavar="FILE", dest="source", help="measure nothing, show this file")
    parser.add_argument("--page", action="store_true", help="write the tables into docs/performance.md")
    options = parser.parse_args()
    bench_block.check_arguments(parser, options)
    bench_compile.check_arguments(parser, options)
    found = json.loads(Path(options.source).read_text()) if options.source else _measured(options)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    text = markdown(found)
    print(text)
    if options.page:
        _PAGE.write_text(in_page(_PAGE.read_text(), text))
        print(f"\nwrote {_PAGE}")


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{os.cpu_count()} cores of {_processor()}, torch {torch.__version__}, Python "
        f"{platform.python_version()}",
        "commit": _commit(),
        "arguments": {name: value for name, value in vars(options).items() if name not in ("json", "source", "page")},
        "load before": round(os.getloadavg()[0], 2),
    }
    print(f"{found['machine']}, load {found['load before']}", flush=True)
    start = time.perf_counter()
    found["block"] = bench_block.measured(options)
    print(f"the block took {time.perf_counter() - start:.0f} s", flush=True)
    found["compile"] = bench_compile.measured(options, until=start + 60 * options.minutes)
    found["minutes"] = round((time.perf_counter() - start) / 60, 1)
    return found


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"


def markdown(found: Mapping[str, Any]) -> str:
    """All tables of one run, with the run's facts before them."""
    options, seconds = found["arguments"], found["compile"]
    facts = (
        f"One run of {found['date']}, {found['minutes']} minutes, commit {found['commit']}: {found['machine']}, load "
        f"{found['load before']} before it; {options['ranks']} ranks, {options['rounds']} rounds. "
        f"Largest difference from the first row's result: {_largest_difference(found['block']):.1g}."
    )
    parts = [facts, tables(found["block"])]
    if seconds:
        parts += [f"**Compile time**, {options['layers']} blocks, {_rounds(seconds)} rounds"]
        parts += [compile_table(seconds)]
    return "\n\n".join([*parts, "**Goals**", goals_table(goals(found["block"], seconds))])


def _rounds(seconds: Mapping[str, Any]) -> int:
    return len(next(iter(seconds.values())))


def _largest_difference(block: Mapping[str, Any]) -> float:
    return max((row["difference"] for rows in block.values() for row in rows.values()), default=0.0)


def in_page(page: str, text: str) -> str:
    """`page` with `text` between the two marks.

    Raises:
        ValueError: the page does not hold both marks, in this order.
    """
    before, mark, rest = page.partition(_START)
    _, end, after = rest.partition(_END)
    if not mark or not end:
        raise ValueError(f"{_PAGE} needs the lines {_START} and {_END}, in this order")
    return f"{before}{_START}\n\n{text}\n\n{_END}{after}"


if __name__ == "__main__":
    main()
