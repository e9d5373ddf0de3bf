"""What `tools/bench_block.py` and `tools/bench_compile.py` found, as Markdown tables, and which goals that meets.

Plain functions of what stands in the JSON file: nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

__all__ = ["Goal", "compile_table", "goals", "goals_table", "table", "tables"]

Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Goal:
    """One goal: what is asked for, what was found, and whether that is it."""

    what: str
    found: str
    met: bool


def tables(block: Mapping[str, Rows]) -> str:
    """A titled table for each measurement ("forward, 2048 tokens")."""
    return "\n\n".join(f"**{title[0].upper()}{title[1:]}**\n\n{_block_table(rows)}" for title, rows in block.items())


def _block_table(rows: Rows) -> str:
    """A row for each candidate; times as ratios to the first one's."""
    own = next(iter(rows.values()))["ms"]
    cells = []
    for name, row in rows.items():
        layouts = str(row["layout kernels"])
        if row["layout kernels"]:
            away = row["of them next to no product or attention"]
            layouts += f", {away} of them next to no GEMM or SDPA" if away else ", next to a GEMM or SDPA"
        times = row["all ms"]
        cells.append(
            [
                name,
                str(row["graphs"]),
                str(row["exchanges"]),
                layouts,
                str(row["uncompiled copies"]),
                f"{row['bytes copied'] / 1e6:.2f}",
                f"{row['bytes sent'] / 1e6:.2f}",
                f"{row['ms']:.0f} ({min(times):.0f} to {max(times):.0f})",
                f"{row['ms'] / own:.2f} x",
            ]
        )
    columns = ["", "graphs", "exchanges", "layout kernels", "uncompiled copies", "MB copied", "MB sent"]
    return table([*columns, "ms, median (range)", "time"], cells)


def compile_table(seconds: Mapping[str, Sequence[float]]) -> str:
    """A row for each way, with medians over the rounds; cold starts as ratios to the model alone."""
    ways = list(dict.fromkeys(name.split()[0] for name in seconds))
    cells = []
    for way in ways:
        cold, warm, over, over_cpu, share = _seconds(seconds[f"{way} cold"]), "", "", "", ""
        if way != "alone" and "alone" in ways:
            over = _ratio(seconds, f"{way} cold", "alone cold")
            over_cpu = _ratio(seconds, f"{way} cold cpu", "alone cold cpu")
        if f"{way} warm" in seconds:
            warm, share = _seconds(seconds[f"{way} warm"]), _ratio(seconds, f"{way} warm", f"{way} cold")
        cells.append([_WAYS[way], cold, over, over_cpu, warm, share])
    columns = ["", "cold, s", "cold over alone", "the same in processor time", "warm, s", "warm over cold"]
    return table(columns, cells)


_WAYS = {
    "alone": "without sequence parallelism",
    "parallel": "sequence-parallel, default passes",
    "enabled": "sequence-parallel, `enable()`",
}


def _seconds(values: Sequence[float]) -> str:
    return f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def _ratio(seconds: Mapping[str, Sequence[float]], above: str, below: str) -> str:
    """Of the medians; in brackets the smallest and the largest of one round."""
    each = [one / other for one, other in zip(seconds[above], seconds[below], strict=True)]
    return f"{_of_medians(seconds, above, below):.3f} ({min(each):.3f} to {max(each):.3f})"


def _of_medians(seconds: Mapping[str, Sequence[float]], above: str, below: str) -> float:
    return median(seconds[above]) / median(seconds[below])


def goals(block: Mapping[str, Rows], seconds: Mapping[str, Sequence[float]]) -> list[Goal]:
    """The goals for which there are figures, in the order of issue 6."""
    found = []
    for title, rows in block.items():
        if title.startswith("forward,"):
            own, fused, merged = (rows[f"fvops, {name}"] for name in _FORWARD)
            found += [
                _exactly("`enable()`, forward: 2 exchanges", own["exchanges"], 2),
                _exactly("`enable()` and fused layout, forward: 2 exchanges", fused["exchanges"], 2),
                _exactly(
                    "fused layout and merge, forward: no layout kernel but next to a GEMM or SDPA",
                    merged["of them next to no product or attention"],
                    0,
                ),
                _exactly("`enable()`, forward: no layout kernel", own["layout kernels"], 0),
                _exactly("`enable()` and fused layout (absorb), forward: none", fused["layout kernels"], 0),
            ]
    for way in ("parallel", "enabled"):
        if f"{way} cold" in seconds:
            if "alone cold" in seconds:
                over = _of_medians(seconds, f"{way} cold", "alone cold")
                what = f"compile time, {_WAYS[way]}: at most 1.10 x that of the model alone"
                found.append(Goal(what, f"{over:.3f} x", over <= 1.10))
            share = _of_medians(seconds, f"{way} warm", f"{way} cold")
            found.append(Goal(f"warm start, {_WAYS[way]}: under 0.25 of cold", f"{share:.3f}", share < 0.25))
    return found


_FORWARD = ("enable()", "enable(), fused layout", "fused layout and merge")


def _exactly(what: str, number: int, wanted: int) -> Goal:
    return Goal(what, str(number), number == wanted)


def goals_table(found: Sequence[Goal]) -> str:
    """A row for each goal."""
    return table(["goal", "found", ""], [[one.what, one.found, "met" if one.met else "MISSED"] for one in found])


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are padded, so that a terminal shows them too."""
    widths = [max(len(row[place]) for row in (columns, *rows)) for place in range(len(columns))]
    lines = [columns, ["-" * max(width, 3) for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in lines
    )
