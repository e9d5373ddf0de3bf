"""fvops.report of a program with and without `overlap`: what is started and waited for when, and what that hides."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

import fvops
from fvops.graph_report import Graph, Kernel, Machine, Report, planned_groups

B, S, H, D = 1, 2048, 16, 64
# 104 us an exchange, 172 us a product of what one receives, 86 us the product beside them.
MACHINE = Machine(bandwidth_gb_s=50.0, latency_us=20.0, tflops=50.0, memory_gb_s=1000.0)


def _two_branches(x: Tensor, first: Tensor, second: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    group = fvops.get_sp_group()
    one, other = group.all_to_all_4D(x.sin(), 2, 1), group.all_to_all_4D(x.cos(), 2, 1)
    return one.flatten(2) @ first, other.flatten(2) @ second, x.flatten(2) @ own


def _report(overlap: bool) -> Report:
    with torch.device("meta"):
        sizes = ((B, S, H, D), (H // 2 * D, 2048), (H // 2 * D, 2048), (H * D, H * D))
        inputs = [torch.empty(size) for size in sizes]
    with planned_groups(sp_size=2), fvops.compiler.enable(overlap=overlap):
        return fvops.report(_two_branches, *inputs, machine=MACHINE)


@pytest.fixture(scope="module")
def whole() -> Report:
    return _report(overlap=False)


@pytest.fixture(scope="module")
def split() -> Report:
    return _report(overlap=True)


def _starts_and_waits(report: Report) -> tuple[list[Kernel], list[Kernel]]:
    kernels = report.graphs[0].kernels
    return [one for one in kernels if one.collective is not None], [one for one in kernels if one.kind == "wait"]


def test_starts_and_waits_in_order(split: Report) -> None:
    graph = split.graphs[0]
    starts, waits = _starts_and_waits(split)
    assert [start.label for start in starts] == ["all_to_all_4D_start"] * 2
    assert [graph.wait_of(start) for start in starts] == waits
    first, second = waits
    # Both are on their way before anything is waited for, and one after the other.
    assert starts[0].start_us + starts[0].us <= starts[1].start_us
    products = [kernel for kernel in graph.kernels if kernel.kind == "gemm"]
    times = [kernel.start_us for kernel in (starts[0], first, products[1], second, products[2])]
    assert times == sorted(times)
    assert products[0].start_us == pytest.approx(starts[0].start_us)
    # A wait ends when its exchange has arrived, or at once where that was before.
    assert first.start_us + first.us == pytest.approx(starts[0].start_us + starts[0].us)
    assert second.us == 0 < second.start_us - (starts[1].start_us + starts[1].us)


def test_less_is_exposed_than_without(whole: Report, split: Report) -> None:
    both = sum(kernel.us for kernel in whole.graphs[0].collectives)
    assert whole.exposed_us == pytest.approx(both)
    assert _starts_and_waits(whole)[1] == []
    graph = split.graphs[0]
    product = next(kernel for kernel in graph.kernels if kernel.kind == "gemm")
    starts, _ = _starts_and_waits(split)
    # The product beside it hides most of the first exchange, the first one's own product the whole of the second.
    assert [graph.exposed_us_of(start) for start in starts] == pytest.approx([starts[0].us - product.us, 0])
    assert split.exposed_us == pytest.approx(starts[0].us - product.us)
    assert split.us == pytest.approx(whole.us - (whole.exposed_us - split.exposed_us))


def _reduced_behind(x: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    group = fvops.get_sp_group()
    received = group.all_to_all_4D(x.sin(), 2, 1)
    return received.cos(), group.all_reduce(x[:, :1, :1, :1]), x.flatten(2) @ own


def test_what_stands_behind_a_started_exchange_is_charged_with_its_own_time_only() -> None:
    """A collective that is not split waits for the exchanges before it: their time, of which none is counted twice."""
    with torch.device("meta"):
        inputs = [torch.empty(size) for size in ((B, S, H, D), (H * D, 64))]
    with planned_groups(sp_size=2), fvops.compiler.enable(overlap=True):
        graph = fvops.report(_reduced_behind, *inputs, machine=MACHINE).graphs[0]
    start, reduction = graph.collectives
    assert (start.label, reduction.label) == ("all_to_all_4D_start", "all_reduce")
    assert graph.exposed_us_of(reduction) == reduction.us
    for collective in (start, reduction):
        assert 0 < graph.exposed_us_of(collective) <= collective.us
    computed = sum(kernel.us for kernel in graph.kernels if kernel.kind not in ("collective", "wait"))
    assert graph.exposed_us == pytest.approx(graph.us - computed)


def _copied_behind(x: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    received = fvops.get_sp_group().all_to_all_4D(x, 2, 1)
    return received.transpose(1, 2).contiguous(), x.flatten(2) @ own


@pytest.mark.parametrize("overlap", [False, True])
def test_a_layout_kernel_beside_a_wait_is_beside_an_exchange(overlap: bool) -> None:
    with torch.device("meta"):
        inputs = [torch.empty(size) for size in ((B, S, H, D), (H * D, 64))]
    with planned_groups(sp_size=2), fvops.compiler.enable(overlap=overlap):
        report = fvops.report(_copied_behind, *inputs)
    assert [kernel.kind for kernel in report.graphs[0].kernels].count("wait") == overlap
    assert (len(report.layout_kernels), len(report.layout_kernels_at_exchanges)) == (1, 1)


def test_the_text_says_which_one_is_waited_for(whole: Report, split: Report) -> None:
    lines = [line for line in split.text().splitlines() if "all_to_all_4D_" in line and line.startswith("  ")]
    assert [line.split(",")[0].split("[")[0].strip() for line in lines] == [
        "1 all_to_all_4D_start on 'planned_sp:0' (2 ranks)",
        "2 all_to_all_4D_start on 'planned_sp:0' (2 ranks)",
        "4 all_to_all_4D_wait for 1",
        "6 all_to_all_4D_wait for 2",
    ]
    assert ", 104 us, of which 18 us exposed, at " in lines[0]
    assert ", 18 us exposed, at " in lines[2]
    assert "wait" not in whole.text()


def test_the_drawing(whole: Report, split: Report) -> None:
    """In the lane of collectives the exchanges, in that of computing the time in which it stands still."""
    for report in (whole, split):
        graph = report.graphs[0]
        page = report.html()
        picture = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
        bars = [bar for bar in picture.iter("rect") if bar.get("stroke")]
        exchanges = [bar for bar in bars if "all_to_all_4D" in _title(bar) and "wait" not in _title(bar)]
        assert {bar.get("y") for bar in exchanges} == {"88"}
        still = [bar for bar in bars if bar.get("fill") == "#e3a49c" and bar.get("y") == "0"]
        scale = 880 / graph.us
        shown = [float(bar.get("width", 0)) for bar in still if float(bar.get("width", 0)) > 1.5]
        assert sum(shown) == pytest.approx(scale * graph.exposed_us, abs=0.1)
        starts = [float(bar.get("x", 0)) for bar in exchanges]
        assert starts == pytest.approx([110 + scale * kernel.start_us for kernel in graph.collectives], abs=0.1)


def _title(bar: ElementTree.Element) -> str:
    return bar.findtext("title") or ""


@pytest.mark.parametrize(("kernels", "width"), [(8, 1000), (500, 6110), (100_000, 20_000)])
def test_many_kernels_are_drawn_wider(kernels: int, width: int) -> None:
    """So that a model of many blocks can be read; the page scrolls then."""
    row = tuple(Kernel(f"op{place}", "gemm", "aten::mm", 8, 8, "", us=1.0, start_us=place) for place in range(kernels))
    report = Report("many", False, (Graph(0, "inference", row, 0, 0),), (), (), MACHINE)
    page = report.html()
    picture = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    assert picture.get("viewBox", "").split()[2] == str(width)
    assert (picture.get("style") is None) == (width == 1000)
    bars = [bar for bar in picture.iter("rect") if bar.get("stroke")]
    assert len(bars) == kernels
    assert float(bars[-1].get("x", 0)) < width
