"""A report for a terminal."""

from __future__ import annotations

from collections import Counter

from fvops.graph_report.contents import Graph, Kernel, Machine, Report

__all__ = ["megabytes", "milliseconds", "outside_lines", "repeated", "shapes", "speeds", "summary", "text"]


def summary(report: Report) -> str:
    """One line: graphs, breaks, collectives, bytes, layout kernels, exposed communication."""
    layout = f"{_count(len(report.layout_kernels), 'layout kernel')}"
    if report.layout_kernels:
        layout += f" ({len(report.layout_kernels_at_exchanges)} beside an exchange)"
    parts = [
        _count(len(report.graphs), "graph"),
        _count(len(report.breaks), "break"),
        _count(len(report.collectives), "collective"),
        f"{megabytes(report.sent_bytes)} sent by a rank",
        layout,
        f"exposed communication {milliseconds(report.exposed_us)} of {milliseconds(report.us)} (estimated)",
    ]
    if report.outside:
        parts.append(f"{_count(len(report.outside), 'collective')} OUTSIDE of graphs")
    if repeated(report):
        parts.append("graphs that ran more than once count once")
    if report.stopped:
        parts.append("stopped early")
    return f"{report.name}: " + ", ".join(parts)


def text(report: Report) -> str:
    """The summary, then breaks, graphs with collectives and layout kernels, and what the passes did."""
    lines = [summary(report), f"estimated with {speeds(report.machine)}"]
    if not report.executed:
        lines.append("on fake tensors: nothing was computed, nothing was sent")
    if report.stopped:
        lines.append(f"STOPPED: {report.stopped}; what follows is not in this report")
    lines += [f"break at {found.where or 'an unknown line'}: {found.reason}" for found in report.breaks]
    lines += [f"outside of graphs: {line}" for line in outside_lines(report)]
    for graph in report.graphs:
        lines += _graph_lines(graph)
    lines += [f"pass: {line}" for line in report.passes] or ["no passes ran"]
    return "\n".join(lines)


def repeated(report: Report) -> list[Graph]:
    """The graphs that the call ran more than once."""
    return [graph for graph in report.graphs if graph.runs > 1]


def outside_lines(report: Report) -> list[str]:
    """A line for each place that issued collectives outside of graphs."""
    often = Counter(report.outside)
    return [f"{count} x {one.op} on {one.group!r}, at {one.where}" for one, count in often.items()]


def _graph_lines(graph: Graph) -> list[str]:
    ran = f", run {graph.runs} times" if graph.runs > 1 else ""
    lines = [
        f"graph {graph.number} ({graph.phase}{ran}): {_count(len(graph.kernels), 'kernel')}, "
        f"inputs {megabytes(graph.input_bytes)}, peak of the results {megabytes(graph.peak_bytes)}, "
        f"{milliseconds(graph.us)}, of which {milliseconds(graph.exposed_us)} exposed communication"
    ]
    for place, kernel in enumerate(graph.kernels):
        if kernel.collective is not None:
            lines.append(f"  {place:3} {_collective_line(graph, kernel)}")
        elif kernel.kind == "wait":
            started = [str(number) for number, other in enumerate(graph.kernels) if graph.wait_of(other) is kernel]
            of = f" for {', '.join(started)}" if started else ""
            lines.append(f"  {place:3} {kernel.label}{of}, {milliseconds(kernel.exposed_us)} exposed{_at(kernel)}")
        elif kernel.kind == "layout":
            beside = ", ".join(kernel.beside) or "the graph's inputs and outputs"
            lines.append(f"  {place:3} layout kernel {megabytes(kernel.nbytes)} between {beside}{_at(kernel)}")
    return lines


def _collective_line(graph: Graph, kernel: Kernel) -> str:
    collective = kernel.collective
    if collective is None:
        return kernel.label
    size = f"{megabytes(collective.nbytes)} in, {megabytes(collective.sent_bytes)} sent"
    what = f"{collective.op} on {collective.group!r} ({_count(collective.world_size, 'rank')})"
    time = f"{milliseconds(kernel.us)}, of which {milliseconds(graph.exposed_us_of(kernel))} exposed"
    return f"{what} {shapes(kernel)} {size}, {time}{_at(kernel)}"


def shapes(kernel: Kernel) -> str:
    """The collective's shapes and dtype, ``[1, 8, 4, 16] x 3 float32``; equal ones once."""
    collective = kernel.collective
    if collective is None or not collective.shapes:
        return ""
    different = list(dict.fromkeys(collective.shapes))
    times = [
        f" x {collective.shapes.count(shape)}" if collective.shapes.count(shape) > 1 else "" for shape in different
    ]
    listed = ", ".join(f"{list(shape)}{often}" for shape, often in zip(different, times, strict=True))
    return f"{listed} {collective.dtype}"


def speeds(machine: Machine) -> str:
    """The machine, in words."""
    return (
        f"{machine.bandwidth_gb_s:g} GB/s and {machine.latency_us:g} us a collective, {machine.tflops:g} TFLOP/s, "
        f"{machine.memory_gb_s:g} GB/s memory"
    )


def megabytes(nbytes: int) -> str:
    """Bytes in MB (1e6), small ones in kB or B."""
    if nbytes < 1e3:
        return f"{nbytes} B"
    return f"{nbytes / 1e3:.3g} kB" if nbytes < 1e6 else f"{nbytes / 1e6:,.1f} MB"


def milliseconds(us: float) -> str:
    """A time in ms, short ones in us."""
    return f"{us:.3g} us" if us < 1e3 else f"{us / 1e3:,.2f} ms"


def _at(kernel: Kernel) -> str:
    return f", at {kernel.where}" if kernel.where else ""


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
