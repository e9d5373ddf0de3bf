"""A report as one HTML page without scripts or anything to load; each graph's timeline is drawn as inline SVG."""

from __future__ import annotations

from html import escape

from fvops.graph_report.contents import Graph, Kernel, Report
from fvops.graph_report.text import megabytes, milliseconds, outside_lines, shapes, speeds, summary

__all__ = ["page"]

# A drawing has the page's width; with more kernels than fit there it is wider, and scrolls.
_WIDTH, _MOST, _KERNEL, _LEFT, _LANE, _GAP = 1000, 20_000, 12, 110, 34, 10
_LANES = ("compute", "layout", "collectives")
_COLOURS = {
    "gemm": "#4269a5",
    "attention": "#7b52a1",
    "fused": "#7fa6cf",
    "other": "#9aa5b1",
    "layout": "#d98324",
    "collective": "#c0392b",
    "wait": "#e3a49c",
}
_KEY = {kind: kind for kind in _COLOURS} | {"wait": "wait: nothing runs but communication"}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1060px; padding: 0 1rem; color: #1c2430; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
dl { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
dl div { background: #f2f4f7; border-radius: 6px; padding: .5rem .9rem; }
dt { color: #5b6675; font-size: .8rem; } dd { margin: 0; font-size: 1.15rem; font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #dfe3e8; vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.where { color: #5b6675; overflow-wrap: anywhere; }
.key span { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; border-radius: 2px; }
.warning { background: #fdeceA; padding: .5rem .9rem; border-radius: 6px; }
.timeline { overflow-x: auto; } svg { width: 100%; height: auto; } p.note { color: #5b6675; font-size: .85rem; }
"""


def page(report: Report) -> str:
    """The page's text."""
    title = f"fvops.report: {escape(report.name)}"
    body = [f"<h1>{title}</h1>", f"<p>{escape(summary(report))}</p>", _tiles(report)]
    if report.stopped:
        body.append(f'<p class="warning">Stopped early: {escape(report.stopped)}. What follows is not in here.</p>')
    body += [_breaks(report), _outside(report), _key()]
    body += [_graph(graph) for graph in report.graphs]
    body.append(_passes(report))
    run = "" if report.executed else " Traced on fake tensors: nothing was computed or sent."
    body.append(f'<p class="note">Times are estimates from stated speeds: {escape(speeds(report.machine))}.{run}</p>')
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>"


def _tiles(report: Report) -> str:
    tiles = {
        "graphs": len(report.graphs),
        "breaks": len(report.breaks),
        "collectives": len(report.collectives),
        "sent by a rank": megabytes(report.sent_bytes),
        "layout kernels": len(report.layout_kernels),
        "of them beside an exchange": len(report.layout_kernels_at_exchanges),
        "peak of the results": megabytes(report.peak_bytes),
        "exposed communication": milliseconds(report.exposed_us),
    }
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles.items()) + "</dl>"


def _breaks(report: Report) -> str:
    if not report.breaks:
        return "<p>No graph breaks.</p>"
    rows = [[escape(found.where), escape(found.reason)] for found in report.breaks]
    return "<h2>Graph breaks</h2>" + _table([("at", "where"), ("why", "")], rows)


def _outside(report: Report) -> str:
    if not report.outside:
        return ""
    lines = "".join(f"<li>{escape(line)}</li>" for line in outside_lines(report))
    return f'<div class="warning">Collectives outside of graphs, which no figure here holds:<ul>{lines}</ul></div>'


def _key() -> str:
    return (
        '<p class="key">'
        + "".join(f'<span style="background:{_COLOURS[kind]}"></span>{name}' for kind, name in _KEY.items())
        + "</p>"
    )


def _graph(graph: Graph) -> str:
    ran = f", run {graph.runs} times" if graph.runs > 1 else ""
    title = f"<h2>Graph {graph.number}, {graph.phase}{ran}: {len(graph.kernels)} kernels</h2>"
    note = (
        f"<p>Inputs {megabytes(graph.input_bytes)}, peak of the results {megabytes(graph.peak_bytes)}, estimated "
        f"{milliseconds(graph.us)}, of which {milliseconds(graph.exposed_us)} exposed communication.</p>"
    )
    return title + note + _timeline(graph) + _collectives(graph) + _layout_kernels(graph)


def _timeline(graph: Graph) -> str:
    """The kernels over time: lanes for compute, layout and collectives, each bar with its facts as a tooltip.

    Where nothing runs because of a collective, the compute lane says so in the colour of a wait.
    """
    width = min(max(_WIDTH, _LEFT + _KERNEL * len(graph.kernels)), _MOST)
    height, span = len(_LANES) * (_LANE + _GAP) + 30, width - _LEFT - 10
    scale = span / (graph.us or 1.0)
    style = "" if width == _WIDTH else f' style="width: {width}px"'
    parts = [f'<div class="timeline"><svg viewBox="0 0 {width} {height}"{style} role="img" ']
    parts.append(f'aria-label="timeline of graph {graph.number}, {graph.phase}">')
    for row, lane in enumerate(_LANES):
        y = row * (_LANE + _GAP)
        parts.append(f'<rect x="{_LEFT}" y="{y}" width="{span}" height="{_LANE}" fill="#f2f4f7"/>')
        parts.append(f'<text x="0" y="{y + 22}" font-size="14" fill="#1c2430">{lane}</text>')
    parts += [_bar(kernel, scale) for kernel in graph.kernels]
    ticks = 4 * width // _WIDTH
    for tick in range(ticks + 1):
        x = _LEFT + span * tick / ticks
        anchor = "end" if tick == ticks else "middle" if tick else "start"
        time = milliseconds(graph.us * tick / ticks)
        parts.append(
            f'<text x="{x:.1f}" y="{height - 8}" font-size="12" fill="#5b6675" text-anchor="{anchor}">{time}</text>'
        )
    return "".join(parts) + "</svg></div>"


def _bar(kernel: Kernel, scale: float) -> str:
    row = 2 if kernel.kind == "collective" else 1 if kernel.kind == "layout" else 0
    size = megabytes(kernel.collective.sent_bytes) + " sent" if kernel.collective else megabytes(kernel.nbytes)
    if kernel.kind == "wait":
        size = "nothing else runs meanwhile"
    facts = f"{kernel.label}: {milliseconds(kernel.us)}, {size}" + (f", {kernel.where}" if kernel.where else "")
    bar = _rect(kernel.start_us, kernel.us, row, kernel.kind, scale, f"<title>{escape(facts)}</title>")
    if kernel.collective is not None and kernel.exposed_us > 0:
        bar += _rect(kernel.start_us + kernel.us - kernel.exposed_us, kernel.exposed_us, 0, "wait", scale)
    # A name where one fits, at about eight units a letter.
    fitting = [name for name in (kernel.label, kernel.kind) if kernel.us * scale >= 8 * len(name) + 12]
    if not fitting:
        return bar
    x, y = _LEFT + kernel.start_us * scale + 4, row * (_LANE + _GAP) + 21
    return bar + f'<text x="{x:.2f}" y="{y}" font-size="12" fill="#fff">{escape(fitting[0])}</text>'


def _rect(start_us: float, us: float, row: int, kind: str, scale: float, inside: str = "") -> str:
    x, y = _LEFT + start_us * scale, row * (_LANE + _GAP)
    width = max(us * scale, 1.5)  # the shortest must be seen too
    return (
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_LANE}" fill="{_COLOURS[kind]}" '
        f'stroke="#fff" stroke-width="0.5">{inside}</rect>'
    )


def _collectives(graph: Graph) -> str:
    rows = []
    for kernel in graph.collectives:
        collective = kernel.collective
        if collective is None:
            continue
        rows.append(
            [
                escape(collective.op),
                f"{escape(collective.group)}, {collective.world_size}",
                escape(shapes(kernel)),
                megabytes(collective.sent_bytes),
                milliseconds(kernel.us),
                milliseconds(graph.exposed_us_of(kernel)),
                escape(kernel.where),
            ]
        )
    columns = [("collective", ""), ("group, ranks", ""), ("handed in", ""), ("sent", "number")]
    columns += [("estimated", "number"), ("exposed", "number"), ("at", "where")]
    return _table(columns, rows) if rows else "<p>No collectives.</p>"


def _layout_kernels(graph: Graph) -> str:
    rows = [
        [escape(", ".join(kernel.beside)), megabytes(kernel.nbytes), milliseconds(kernel.us), escape(kernel.where)]
        for kernel in graph.layout_kernels
    ]
    columns = [("layout kernel beside", ""), ("read and written", "number"), ("estimated", "number"), ("at", "where")]
    return _table(columns, rows) if rows else "<p>No layout kernels.</p>"


def _passes(report: Report) -> str:
    if not report.passes:
        return "<h2>Compiler passes</h2><p>No passes ran.</p>"
    return "<h2>Compiler passes</h2><ol>" + "".join(f"<li>{escape(line)}</li>" for line in report.passes) + "</ol>"


def _table(columns: list[tuple[str, str]], rows: list[list[str]]) -> str:
    head = "".join(f'<th class="{kind}">{name}</th>' for name, kind in columns)
    cells = [
        "".join(f'<td class="{kind}">{cell}</td>' for cell, (_, kind) in zip(row, columns, strict=True)) for row in rows
    ]
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"
