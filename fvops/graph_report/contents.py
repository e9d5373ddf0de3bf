"""What a report holds: plain values, comparable, and ready for JSON. Times are estimates (see `estimate`)."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Break", "Collective", "Graph", "Kernel", "Machine", "Outside", "Report"]


@dataclass(frozen=True)
class Machine:
    """The speeds that the times of a report are computed from: stated by the reader, measured by nobody.

    Attributes:
        bandwidth_gb_s: what one rank sends, 1e9 bytes a second.
        latency_us: what every collective costs on top.
        tflops: of matrix products and attention, 1e12 operations a second.
        memory_gb_s: what every kernel reads and writes, 1e9 bytes a second.

    Raises:
        ValueError: a speed is not positive, or the latency is negative.
    """

    bandwidth_gb_s: float = 50.0
    latency_us: float = 20.0
    tflops: float = 200.0
    memory_gb_s: float = 2000.0

    def __post_init__(self) -> None:
        for name in ("bandwidth_gb_s", "tflops", "memory_gb_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"fvops.report: {name}={getattr(self, name)!r} must be larger than 0")
        if not self.latency_us >= 0:
            raise ValueError(f"fvops.report: latency_us={self.latency_us!r} must not be negative")


@dataclass(frozen=True)
class Break:
    """A place where Dynamo ended one graph: the user's file and line, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class Outside:
    """A collective that ran outside of every graph, in code that Dynamo has left to Python: op, group, user's line."""

    op: str
    group: str
    where: str


@dataclass(frozen=True)
class Collective:
    """What one rank hands to a collective.

    Attributes:
        op: the op's name; ``_c10d_functional.`` before it for those of torch.
        group: the group's ``unique_name``, for torch's its process group's name.
        world_size: the number of ranks, 0 where the op does not say.
        shapes: of the tensors handed in (for `recv`, of the one received).
        dtype: theirs, "" without tensors.
        nbytes: bytes handed in.
        sent_bytes: bytes that leave the rank, see `fvops.graph_report.estimate.sent_bytes`.
        is_start: the result is only there after a later kernel of kind "wait".
    """

    op: str
    group: str
    world_size: int
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    nbytes: int
    sent_bytes: int
    is_start: bool = False


@dataclass(frozen=True)
class Kernel:
    """One launch of a compiled graph, in the order in which Inductor has scheduled it.

    Attributes:
        name: Inductor's name, unique in its graph.
        kind: "collective", "wait", "gemm", "attention", "layout" (it moves elements and computes nothing), "fused"
            (a kernel that Inductor generates and that computes) or "other".
        op: the op that an "other", "gemm", "attention" or "collective" kernel calls, "" for generated ones.
        nbytes: read and written.
        flops: of matrix products and attention, else 0.
        where: the user's line, "" where the compiler has lost it.
        reads: names of the kernels whose results it reads.
        beside: for "layout", the ops or kinds that make what it reads or read what it makes.
        us: estimated time alone.
        start_us: estimated start within its graph.
        exposed_us: for "collective" and "wait", how long nothing else runs because of it.
    """

    name: str
    kind: str
    op: str
    nbytes: int
    flops: int
    where: str
    reads: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    collective: Collective | None = None
    us: float = 0.0
    start_us: float = 0.0
    exposed_us: float = 0.0

    @property
    def label(self) -> str:
        """The op's short name, else the kind."""
        return self.op.rsplit("::", 1)[-1] if self.op else self.kind


@dataclass(frozen=True)
class Graph:
    """One compiled graph.

    Attributes:
        number: of the graph, as Dynamo found them; forward and backward share it.
        phase: "inference", "forward" or "backward".
        kernels: in order.
        input_bytes: parameters and inputs that the graph is given.
        peak_bytes: largest sum of results that are alive at once, inputs not counted; without the transports' buffers.
        runs: how often the one call that is reported ran it; 0 for what it stopped before.
    """

    number: int
    phase: str
    kernels: tuple[Kernel, ...]
    input_bytes: int
    peak_bytes: int
    runs: int = 1

    @property
    def collectives(self) -> list[Kernel]:
        return [kernel for kernel in self.kernels if kernel.collective is not None]

    @property
    def layout_kernels(self) -> list[Kernel]:
        return [kernel for kernel in self.kernels if kernel.kind == "layout"]

    def wait_of(self, start: Kernel) -> Kernel | None:
        """The kernel that waits for what `start` has begun; None for a collective that is not split."""
        waits = (kernel for kernel in self.kernels if kernel.kind == "wait" and start.name in kernel.reads)
        return next(waits, None) if start.collective is not None and start.collective.is_start else None

    def exposed_us_of(self, collective: Kernel) -> float:
        """How long nothing else runs because of `collective`: while it is issued, or in its wait."""
        wait = self.wait_of(collective)
        return collective.exposed_us + (wait.exposed_us if wait else 0.0)

    @property
    def us(self) -> float:
        """Estimated time of all kernels."""
        return max((kernel.start_us + kernel.us for kernel in self.kernels), default=0.0)

    @property
    def exposed_us(self) -> float:
        return sum(kernel.exposed_us for kernel in self.kernels)


@dataclass(frozen=True)
class Report:
    """What `fvops.report` found.

    Attributes:
        name: of the function or module.
        executed: was it run for real? Otherwise on fake tensors: nothing was computed, nothing was sent.
        graphs: in the order of compilation.
        breaks: graph breaks in the order of tracing.
        passes: what fvops' compiler passes logged, a line each.
        machine: what the times are computed from.
        stopped: why a run on fake tensors ended early, "" if it did not. What follows that place is not reported.
        outside: collectives that ran outside of the graphs, in order; they are in no sum.
    """

    name: str
    executed: bool
    graphs: tuple[Graph, ...]
    breaks: tuple[Break, ...]
    passes: tuple[str, ...]
    machine: Machine
    stopped: str = ""
    outside: tuple[Outside, ...] = ()

    @property
    def collectives(self) -> list[Collective]:
        """Of all graphs, in order, however often a graph ran."""
        return [kernel.collective for graph in self.graphs for kernel in graph.kernels if kernel.collective is not None]

    @property
    def layout_kernels(self) -> list[Kernel]:
        return [kernel for graph in self.graphs for kernel in graph.layout_kernels]

    @property
    def layout_kernels_at_exchanges(self) -> list[Kernel]:
        """Those that read a collective's result or write what a collective sends."""
        ends = [kernel for graph in self.graphs for kernel in graph.kernels if kernel.kind in ("collective", "wait")]
        ops = {kernel.op for kernel in ends}
        return [kernel for kernel in self.layout_kernels if not ops.isdisjoint(kernel.beside)]

    @property
    def sent_bytes(self) -> int:
        return sum(collective.sent_bytes for collective in self.collectives)

    @property
    def peak_bytes(self) -> int:
        return max((graph.peak_bytes for graph in self.graphs), default=0)

    @property
    def us(self) -> float:
        return sum(graph.us for graph in self.graphs)

    @property
    def exposed_us(self) -> float:
        return sum(graph.exposed_us for graph in self.graphs)

    def to_dict(self) -> dict[str, Any]:
        """Everything, with the sums, as dicts, lists, numbers and strings."""
        sums = {
            "collectives": len(self.collectives),
            "sent_bytes": self.sent_bytes,
            "layout_kernels": len(self.layout_kernels),
            "layout_kernels_at_exchanges": len(self.layout_kernels_at_exchanges),
            "peak_bytes": self.peak_bytes,
            "us": self.us,
            "exposed_us": self.exposed_us,
        }
        return {**dataclasses.asdict(self), "sums": sums}

    def json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def summary(self) -> str:
        """One line."""
        from fvops.graph_report.text import summary

        return summary(self)

    def text(self) -> str:
        """Everything, for a terminal."""
        from fvops.graph_report.text import text

        return text(self)

    def html(self) -> str:
        """A page that needs nothing else, with a drawn timeline of each graph."""
        from fvops.graph_report.html import page

        return page(self)

    def save(self, path: str | Path) -> None:
        """Write the report to `path`, in the form that its suffix names: .html, .json or .txt.

        Raises:
            ValueError: another suffix.
        """
        path = Path(path)
        forms = {".html": self.html, ".json": self.json, ".txt": self.text}
        if path.suffix not in forms:
            raise ValueError(f"Report.save: {path} must end in one of {', '.join(forms)}")
        path.write_text(forms[path.suffix]() + "\n", encoding="utf-8")
