"""fvops.report: what it says is what happens; compared with recorded runs, and with counts made by hand."""

from __future__ import annotations

import inspect
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fvops
from compile_tests.programs import INFERENCE, TRAINING, example
from fvops import parallel_state
from fvops.debug import canonical, record_collectives
from fvops.graph_report import Collective, Kernel, Machine, planned_groups
from fvops.graph_report.estimate import sent_bytes, timed
from fvops.graph_report.models import MODELS
from fvops.graph_report.plan import plan
from tests.harness import Ranks

B, S, H, D = 1, 64, 8, 16


class Attention(nn.Module):
    """Ulysses on [B, S/P, C]: three exchanges, attention, one exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(H * D, 3 * H * D), nn.Linear(H * D, H * D)

    def forward(self, x: Tensor) -> Tensor:
        group = fvops.get_sp_group()
        q, k, v = (part.unflatten(2, (H, D)) for part in self.qkv(x).chunk(3, dim=2))
        q, k, v = group.all_to_all_4D(q), group.all_to_all_4D(k), group.all_to_all_4D(v)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        return self.out(group.all_to_all_4D(out, 1, 2).flatten(2))


def _line_of(function: Any, text: str) -> str:
    lines, first = inspect.getsourcelines(function)
    return f"{__file__}:{first + next(place for place, line in enumerate(lines) if text in line)} in "


def test_a_block_on_planned_ranks_by_hand() -> None:
    with torch.device("meta"):
        module, x = Attention(), torch.empty(B, S // 4, H * D)
    with planned_groups(sp_size=4) as group:
        report = fvops.report(module, x, backward=True)
    there, back = (B, S // 4, H, D), (B, S, H // 4, D)
    nbytes = B * x.size(1) * H * D * 4
    forward = [("all_to_all_4D", group.unique_name, 4, (shape,), nbytes) for shape in (there, there, there, back)]
    backward = [("all_to_all_4D", group.unique_name, 4, (shape,), nbytes) for shape in (there, back, back, back)]
    got = [(one.op, one.group, one.world_size, one.shapes, one.nbytes) for one in report.collectives]
    assert got == forward + backward
    assert [graph.phase for graph in report.graphs] == ["forward", "backward"]
    assert report.sent_bytes == 8 * nbytes * 3 // 4
    assert not report.executed
    assert not report.breaks
    lines = [kernel.where for graph in report.graphs for kernel in graph.collectives]
    exchange, last = _line_of(Attention, "q, k, v = group"), _line_of(Attention, "return self.out")
    assert [line.startswith(exchange) for line in lines] == [True] * 3 + [False] * 2 + [True] * 3
    assert all(line.startswith(last) for line in lines[3:5])
    kinds = [kernel.kind for kernel in report.graphs[0].kernels]
    assert (kinds.count("gemm"), kinds.count("attention"), kinds.count("collective")) == (2, 1, 4)
    flops = {kernel.kind: kernel.flops for kernel in report.graphs[0].kernels}
    assert flops["attention"] == 4 * (H // 4) * S**2 * D


def test_sizes_in_every_form(tmp_path: Path) -> None:
    with torch.device("meta"):
        module, x = Attention(), torch.empty(B, S, H * D)
    with planned_groups(sp_size=2):
        report = fvops.report(module, x, bandwidth_gb_s=1.0)
    assert json.loads(report.json()) == json.loads(json.dumps(report.to_dict()))
    assert report.to_dict()["sums"]["collectives"] == 4
    assert report.machine.bandwidth_gb_s == 1.0
    text = report.text()
    assert text.count("all_to_all_4D on 'planned_sp:0' (2 ranks)") == 4
    assert "nothing was computed" in text
    assert "no passes ran" in text
    assert len(report.summary().splitlines()) == 1
    for form in (".html", ".json", ".txt"):
        report.save(tmp_path / f"report{form}")
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "http" not in page
    pictures = [ElementTree.fromstring(part.split("</svg>")[0] + "</svg>") for part in _after_each(page, "<svg")]
    bars = [bar for picture in pictures for bar in picture.iter("rect") if bar.find("title") is not None]
    assert len(bars) == sum(len(graph.kernels) for graph in report.graphs)
    exchanges = [bar for bar in bars if "all_to_all_4D" in str(bar.findtext("title"))]
    assert len({float(bar.get("x", 0)) for bar in exchanges}) == 4
    with pytest.raises(ValueError, match="must end in"):
        report.save(tmp_path / "report.pdf")


def _after_each(text: str, mark: str) -> list[str]:
    return [mark + part for part in text.split(mark)[1:]]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.transpose(0, 1).contiguous(), 1),
        (lambda x: torch.cat([x, x.flip(1)], dim=1), 1),
        (lambda x: F.pad(x, (1, 2)), 1),
        (lambda x: x.transpose(0, 1).contiguous() * 2, 0),
        (lambda x: x.transpose(0, 1).to(torch.float64), 0),
        (lambda x: F.relu(x), 0),
        (lambda x: torch.where(x > 0, x, 0.0), 0),
        (lambda x: x.sum(1), 0),
        (lambda x: torch.zeros_like(x), 0),
        (lambda x: x.view(-1), 0),
        (lambda x: (x @ x).transpose(0, 1).contiguous() @ x.flip(0), 1),
    ],
    ids=["transpose", "cat", "pad", "scaled", "cast", "relu", "where", "sum", "zeros", "view", "matmul"],
)
def test_layout_kernels(function: Callable[[Tensor], Tensor], expected: int) -> None:
    report = fvops.report(function, torch.empty(24, 24), execute=False)
    # Inductor may write a concatenation's parts with a kernel each, or with one.
    assert min(len(report.layout_kernels), max(expected, 1)) == expected
    assert not report.layout_kernels_at_exchanges


def test_layout_kernels_at_an_exchange() -> None:
    x = torch.empty(B, S, H, D)
    with planned_groups(sp_size=2) as group:
        alone = fvops.report(lambda x: group.all_to_all_4D(group.all_to_all_4D(x).flip(1).contiguous(), 1, 2), x)
        fused = fvops.report(lambda x: group.all_to_all_4D(group.all_to_all_4D(x).flip(1).contiguous() * 2, 1, 2), x)
    assert [kernel.beside for kernel in alone.layout_kernels_at_exchanges] == [("fvops::all_to_all_4D",)]
    assert alone.layout_kernels[0].nbytes == 2 * x.numel() * 4
    assert not fused.layout_kernels


def test_a_module_among_the_arguments_is_faked_too() -> None:
    with torch.device("meta"):
        module, x = nn.Linear(6, 6), torch.empty(2, 6)
    before = dict(module.named_parameters())
    report = fvops.report(lambda module, x: module(x), module, x, backward=True)
    assert [graph.phase for graph in report.graphs] == ["forward", "backward"]
    assert all(parameter is before[name] for name, parameter in module.named_parameters())


def test_peak_memory_of_a_chain() -> None:
    """Of four products in a row two results are alive at once, the one read and the one written."""
    report = fvops.report(lambda x: ((x @ x) @ x) @ x, torch.empty(32, 32), execute=False)
    assert report.graphs[0].input_bytes == 32 * 32 * 4
    assert report.peak_bytes == 2 * 32 * 32 * 4


def _breaking(x: Tensor) -> Tensor:
    x = x.sin()
    torch._dynamo.graph_break(msg="on purpose")
    return x.cos() @ x


def test_breaks_are_told_with_line_and_reason() -> None:
    report = fvops.report(_breaking, torch.randn(4, 4))
    assert report.executed
    assert len(report.graphs) == 2
    [found] = report.breaks
    assert found.where.startswith(_line_of(_breaking, "graph_break"))
    assert found.reason
    assert f"break at {found.where}" in report.text()


def test_a_value_that_is_asked_for() -> None:
    def function(x: Tensor) -> Tensor:
        x = x.sin()
        return x.cos() if x.sum() > 0 else x.tan()

    run = fvops.report(function, torch.ones(4))
    assert (len(run.graphs), len(run.breaks), run.stopped) == (2, 1, "")
    faked = fvops.report(function, torch.ones(4), execute=False)
    assert (len(faked.graphs), len(faked.breaks)) == (1, 1)
    assert "value of a tensor" in faked.stopped
    assert "STOPPED" in faked.text()


def test_nothing_is_left_behind() -> None:
    from torch._dynamo.utils import counters, graph_break_reasons
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    before = (dict(module.named_parameters()), dict(module.named_buffers()), GraphLowering.compile_to_module)
    state = (str(counters), len(graph_break_reasons), config.save_config_portable(ignore_private_configs=False))
    for execute in (False, True):
        fvops.report(module, torch.randn(3, 4, requires_grad=True), backward=True, execute=execute)
    fvops.report(_breaking, torch.randn(4, 4))
    after = (dict(module.named_parameters()), dict(module.named_buffers()), GraphLowering.compile_to_module)
    assert all(after[0][name] is before[0][name] for name in before[0])
    assert all(after[1][name] is before[1][name] for name in before[1])
    assert after[2] is before[2]
    assert all(parameter.grad is None for parameter in module.parameters())
    own = config.save_config_portable(ignore_private_configs=False)
    assert (str(counters), len(graph_break_reasons)) == state[:2]
    # Tracing one of our ops puts the salt there, once and for all; nothing else may differ.
    ours = {"unsafe_marked_cacheable_functions", "custom_should_partition_ops"}
    assert {name for name in own if own[name] != state[2].get(name)} <= ours
    torch.testing.assert_close(torch.compile(module, backend="aot_eager")(torch.ones(3, 4)), module(torch.ones(3, 4)))


def test_refusals() -> None:
    x = torch.empty(B, S, H, D)
    with pytest.raises(TypeError, match="needs a function or a module, got a int"):
        fvops.report(3, x)
    with pytest.raises(ValueError, match="no output requires a gradient"):
        fvops.report(torch.sin, x, backward=True)
    with pytest.raises(ValueError, match="cannot run with planned groups"), planned_groups(sp_size=2):
        fvops.report(torch.sin, x, execute=True)
    with pytest.raises(ValueError, match="bandwidth_gb_s=0"):
        fvops.report(torch.sin, x, bandwidth_gb_s=0)
    with pytest.raises(ValueError, match="latency_us=-1"):
        Machine(latency_us=-1)
    with pytest.raises(ValueError, match=r"heads\) has size 8, which is not divisible by world_size 3"):
        with planned_groups(sp_size=3) as group:
            fvops.report(lambda x: group.all_to_all_4D(x), x)


def test_planned_groups() -> None:
    before = [getattr(parallel_state, name) for name in ("_WORLD", "_NODE", "_TP", "_SP", "_DP")]
    with planned_groups(sp_size=4, tp_size=6) as group:
        assert fvops.get_sp_group() is group
        assert (fvops.get_world_size(), fvops.get_tp_world_size(), fvops.get_dp_world_size()) == (12, 6, 3)
        with pytest.raises(RuntimeError, match="there is no group 'planned_sp:0'"):
            group.all_to_all_4D(torch.empty(B, S, H, D))
        with planned_groups(sp_size=2):
            assert fvops.get_sp_world_size() == 2
        assert fvops.get_sp_group() is group
    assert [getattr(parallel_state, name) for name in ("_WORLD", "_NODE", "_TP", "_SP", "_DP")] == before
    with pytest.raises(ValueError, match="sp_size=0"), planned_groups(sp_size=0):
        pass


def _each_program(names: list[str], train: bool) -> list[tuple[list[Any], list[Any], list[Any]]]:
    """(told, sent while it was told, sent by eager) of each program, on this rank."""
    group = fvops.get_sp_group()
    found = []
    for name in names:
        program = (TRAINING if train else INFERENCE)[name]
        x = example(group.world_size, group.rank_in_group).requires_grad_(train)
        with record_collectives() as while_told:
            report = fvops.report(program, x, backward=train)
        with record_collectives() as eager, torch.set_grad_enabled(train):
            result = program(x)
            if train:
                torch.autograd.grad(result, x, torch.ones_like(result))
        told = [(one.group, one.op, one.nbytes) for one in report.collectives]
        found.append((told, canonical(while_told), canonical(eager)))
        if report.breaks:
            raise AssertionError(f"{name}: {report.breaks}")
    return found


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_it_tells_what_ranks_send(world_size: int, train: bool) -> None:
    some = ("coalesced", "reduce_scatter_avg", "broadcast_op") if train else ("ring", "barrier", "broadcast", "splits")
    programs = list(TRAINING if train else INFERENCE)
    names = programs if world_size == 3 else [name for name in programs if any(part in name for part in some)]
    for rank, found in enumerate(Ranks.get(world_size).run(_each_program, names, train, deadline_s=600)):
        for name, (told, while_told, eager) in zip(names, found, strict=True):
            assert told == while_told == eager, f"{name} on rank {rank}"


def test_bytes_that_leave_a_rank() -> None:
    """Against counting element by element who needs what of a rank's 12 elements."""
    for P in (1, 2, 3, 4):
        others = P - 1
        assert sent_bytes("all_to_all_4D", 12, P) == 12 // P * others
        assert sent_bytes("reduce_scatter", 12, P) == 12 // P * others
        assert sent_bytes("all_reduce", 12, P) == 2 * (12 // P) * others
        assert sent_bytes("all_gather", 12, P) == 12 * others
        assert sent_bytes("_c10d_functional.all_gather_into_tensor", 12, P) == 12 * others
        assert sent_bytes("recv", 12, P) == sent_bytes("barrier", 0, P) == 0
        assert sent_bytes("send", 12, P) == (12 if others else 0)


def test_what_runs_beside_a_split_exchange_hides_it() -> None:
    machine = Machine(bandwidth_gb_s=1.0, latency_us=10.0, tflops=1.0, memory_gb_s=1.0)

    def exchange(name: str, is_start: bool) -> Kernel:
        moved = Collective("all_to_all_4D", "sp:0", 2, ((1,),), "int8", 40_000, 20_000, is_start)
        return Kernel(name, "collective", "fvops::all_to_all_4D", 0, 0, "", collective=moved)

    gemm = Kernel("gemm", "gemm", "aten::mm", 1000, 12_000_000, "")
    wait = Kernel("wait", "wait", "fvops::wait", 0, 0, "", reads=("start",))
    # 30 us to travel: 10 and 20 kB at 1 GB/s; the product takes 12.
    apart = timed([exchange("start", True), gemm, wait], machine)
    assert [kernel.us for kernel in apart] == pytest.approx([30, 12, 18])
    assert [kernel.exposed_us for kernel in apart] == pytest.approx([0, 0, 18])
    whole = timed([gemm, exchange("whole", False), gemm], machine)
    assert [kernel.start_us for kernel in whole] == pytest.approx([0, 12, 42])
    assert whole[1].exposed_us == pytest.approx(30)


def test_a_model_is_refused() -> None:
    refused = plan(MODELS["wan-1.3b"], 8)
    assert "dim 2 (heads) has size 12, which is not divisible by world_size 8" in refused.refused
    assert refused.collectives == 0


@pytest.mark.slow
def test_a_plan_by_hand() -> None:
    model = MODELS["wan-1.3b"]
    found = plan(model, 4)
    share_bytes = 32_760 // 4 * 12 * 128 * 2
    assert (found.refused, found.padding, found.collectives) == ("", 0, 2 * 30)
    assert found.sent_bytes == 30 * 4 * (share_bytes * 3 // 4)
    # Self- and cross-attention have four square matrices each, the feed-forward part two: 1.39e9 parameters.
    assert found.parameter_bytes / 2 == pytest.approx(30 * (8 * 1536**2 + 2 * 1536 * 8960), rel=1e-3)


@pytest.mark.slow
def test_padding_is_counted_and_cut_off_before_attention() -> None:
    found = plan(MODELS["cogvideox-5b"], 4)
    assert found.padding == 2
    assert found.collectives == 3 * 42


@pytest.mark.slow
def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = str(Path(__file__).parent.parent / "tools/graph_report.py")
    page = tmp_path / "page.html"
    for arguments, code in ((["--ranks", "4", "--html", str(page)], 0), (["--ranks", "5"], 1)):
        monkeypatch.setattr(sys, "argv", [script, "--model", "wan-1.3b", *arguments])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(script, run_name="__main__")
        assert caught.value.code == code
    out, err = capsys.readouterr()
    assert "one of 30 blocks" in out
    assert "on 5 ranks is refused: fvops" in err
    assert page.read_text().startswith("<!doctype html>")


def test_the_table_of_plans_is_the_tool_s(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/scaling.md holds what tools/scaling.py makes of docs/measurements/scaling.json, for every model."""
    from tools.scaling import _JSON, _print_table

    plans = json.loads(_JSON.read_text())["plans"]
    assert {one["model"] for one in plans} == {model.title for model in MODELS.values()}
    _print_table(plans)
    assert capsys.readouterr().out in (_JSON.parents[1] / "scaling.md").read_text()
