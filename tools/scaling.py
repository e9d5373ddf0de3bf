"""What models need on 1 to 64 ranks: docs/pictures/scaling.png and docs/measurements/scaling.json.

    python tools/scaling.py            # plan every model at every size, then draw
    python tools/scaling.py --draw     # draw again from the JSON

Everything is worked out on this process (`fvops.graph_report.plan`): no rank, no GPU, no memory.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fvops.graph_report import Machine
from fvops.graph_report.models import MODELS
from fvops.graph_report.plan import plan

__all__ = ["main"]

_DOCS = Path(__file__).resolve().parent.parent / "docs"
_JSON, _PICTURE = _DOCS / "measurements/scaling.json", _DOCS / "pictures/scaling.png"
_RANKS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="from the JSON that is there")
    if not parser.parse_args().draw:
        found = {"machine": asdict(Machine()), "plans": [asdict(one) for one in _plans()]}
        _JSON.write_text(json.dumps(found, indent=1) + "\n")
    found = json.loads(_JSON.read_text())
    _print_table(found["plans"])
    _draw(found["plans"])
    print(f"wrote {_PICTURE}")


def _plans() -> list[Any]:
    plans = []
    for name, model in MODELS.items():
        start = time.perf_counter()
        plans += [plan(model, world_size) for world_size in _RANKS]
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return plans


def _print_table(plans: list[dict[str, Any]]) -> None:
    """A Markdown row for each model, as docs/scaling.md has them."""
    sizes = (2, 4, 8)
    columns = (
        "model",
        "runs on P =",
        "padded tokens at P =",
        "collectives",
        "GB sent, P = 2, 4, 8",
        "GB of activations, P = 1, 2, 4, 8",
        "GB of parameters",
    )
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for title in dict.fromkeys(one["model"] for one in plans):
        own = {one["world_size"]: one for one in plans if one["model"] == title}
        runs = [P for P, one in own.items() if not one["refused"]]
        padded = ", ".join(f"{P}: {own[P]['padding']}" for P in runs if own[P]["padding"]) or "none"
        sent = [_gigabytes(own[P], "sent_bytes") for P in sizes]
        activations = [_gigabytes(own[P], "activation_bytes") for P in (1, *sizes)]
        counts = sorted({own[P]["collectives"] for P in runs if P > 1})
        cells = [", ".join(map(str, runs)), padded, "/".join(map(str, counts)), ", ".join(sent), ", ".join(activations)]
        cells.append(_gigabytes(own[1], "parameter_bytes"))
        print(f"| {title} | " + " | ".join(cells) + " |")


def _gigabytes(one: dict[str, Any], key: str) -> str:
    return "refused" if one["refused"] else f"{one[key] / 1e9:.2f}"


def _draw(plans: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(13, 10), constrained_layout=True)
    titles = list(dict.fromkeys(one["model"] for one in plans))
    colours = dict(zip(titles, [f"C{place}" for place in range(10)], strict=False))
    panels = [
        (axes[0][0], "GB sent by a rank in one forward pass", lambda one: one["sent_bytes"] / 1e9),
        (axes[0][1], "GB of activations on a rank (a block's peak)", lambda one: one["activation_bytes"] / 1e9),
        (
            axes[1][0],
            "% of the forward pass in exposed communication (estimated)",
            lambda one: 100 * one["exposed_us"] / one["us"],
        ),
    ]
    for axis, label, value in panels:
        for title in titles:
            runs = [one for one in plans if one["model"] == title and not one["refused"] and value(one) > 0]
            ranks, values = [one["world_size"] for one in runs], [value(one) for one in runs]
            axis.plot(ranks, values, "o-", color=colours[title], label=title, markersize=5, linewidth=1.8)
        _scale(axis, label)
    # Above the panels: in one of them it would hide points.
    handles, labels = axes[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=10, frameon=False)
    _draw_refusals(axes[1][1], plans, titles, colours)
    figure.savefig(_PICTURE, dpi=110)
    plt.close(figure)


def _scale(axis: Any, label: str) -> None:
    axis.set(xscale="log", yscale="log", xlabel="ranks P", title=label, xlim=(0.9, 72))
    axis.set_xticks([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64], minor=False)
    axis.set_xticks([], minor=True)
    axis.xaxis.set_major_formatter(lambda value, _place: f"{value:g}")
    axis.yaxis.set_major_formatter(lambda value, _place: f"{value:g}")
    axis.yaxis.set_minor_formatter(lambda value, _place: f"{value:g}" if str(value * 1e6)[0] in "25" else "")
    axis.tick_params(axis="y", which="minor", labelsize=8)
    axis.grid(True, which="major", color="#d5d9de", linewidth=0.7)


def _draw_refusals(axis: Any, plans: list[dict[str, Any]], titles: list[str], colours: dict[str, Any]) -> None:
    """Which sizes a model runs on: filled where it does, hollow where tokens are padded, a cross where refused."""
    for one in plans:
        place = (_RANKS.index(one["world_size"]), len(titles) - titles.index(one["model"]))
        if one["refused"]:
            axis.plot(*place, "x", color="#b3bac3", markersize=7)
        else:
            padded = bool(one["padding"])
            axis.plot(*place, "s", color=colours[one["model"]], markersize=11, fillstyle="none" if padded else "full")
    axis.set_xticks(range(len(_RANKS)), _RANKS)
    axis.set_yticks(range(len(titles), 0, -1), titles)
    axis.set(xlabel="ranks P", title="runs (hollow: tokens padded), x: refused, heads do not divide")
    for side in ("top", "right", "left", "bottom"):
        axis.spines[side].set_visible(False)


if __name__ == "__main__":
    main()
