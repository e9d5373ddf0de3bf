"""CUDA graphs over the real NCCL in a world of one: hand-made captures, and ``torch.compile(mode="reduce-overhead")``.

The compiled programs also run on CPU tensors over the double, where Inductor makes no graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.alone import OPS, group_of_one, input_of, warm
from tests.devices import on_gpu
from tests.draws import bits
from tests.harness import Ranks

Program = Callable[[Tensor], Tensor]


def _program(name: str, group: Any) -> Program:
    """An op between arithmetic, so that a replay that skipped something would not give eager's values."""
    return lambda x: OPS[name](x * 2, group.unique_name) + x


def _captured(group: Any, program: Program, static: Tensor, pool: Any = None) -> tuple[Any, Tensor]:
    graph = torch.cuda.CUDAGraph()
    with group.graph_capture() as context:
        with torch.cuda.graph(graph, stream=context.stream, pool=pool):
            output = program(static)
    return graph, output


def _capture(name: str) -> list[str]:
    """What is wrong with the replays of one op's graph."""
    from fvops.debug import record_collectives

    group = group_of_one()
    warm(group)
    program = _program(name, group)
    static = input_of(0, group.device)
    program(static)  # compiles what the kernels need
    with record_collectives() as at_capture:
        graph, output = _captured(group, program, static)
    wrong = [] if len(at_capture) == (name != "shard") else [f"the capture recorded {at_capture}"]
    address = output.data_ptr()
    for seed in range(1, 4):
        static.copy_(input_of(seed, group.device))
        with record_collectives() as at_replay:
            graph.replay()
        got = bits(output)
        if not torch.equal(got, bits(program(static))):
            wrong.append(f"replay {seed} differs from eager")
        if at_replay or output.data_ptr() != address:
            wrong.append(f"replay {seed} recorded {at_replay}, or its result moved")
    return wrong


@on_gpu
@pytest.mark.parametrize("name", OPS)
def test_replays_equal_eager(name: str) -> None:
    assert Ranks.get(1, "gpu-nccl").run(_capture, name) == [[]]


def _several() -> list[str]:
    """Three graphs over one group, replayed out of order, then dropped; then the group is used, and made anew."""
    import fvops
    from tests.harness import init_fvops

    group = group_of_one()
    warm(group)
    names = ["all_to_all_4D_coalesced", "all_reduce", "all_gather"]
    made = []
    for name in names:
        program, static = _program(name, group), input_of(0, group.device)
        program(static)
        made.append((program, static, *_captured(group, program, static)))
    wrong = []
    for seed, index in enumerate([2, 0, 1, 1, 0, 2]):
        program, static, graph, output = made[index]
        static.copy_(input_of(seed, group.device))
        graph.replay()
        if not torch.equal(bits(output), bits(program(static))):
            wrong.append(f"graph {index}, replay {seed}")
    del made, program, static, graph, output
    comm = fvops.registry.resolve(group.unique_name, 1).library_comm
    fvops.cleanup_dist_env_and_memory()
    if comm.abort_reason is not None or not comm.disabled:
        wrong.append(f"the communicator was not destroyed in order: {comm.abort_reason}")
    init_fvops(suffix="again")
    x = input_of(9, group.device)
    if not torch.equal(OPS["all_reduce"](x, group_of_one().unique_name), x):
        wrong.append("after everything was made anew")
    return wrong


@on_gpu
def test_several_graphs_go_before_their_group() -> None:
    assert Ranks.get(1, "gpu-nccl").run(_several) == [[]]


def _barrier_inside(group: Any) -> Program:
    def program(x: Tensor) -> Tensor:
        torch.ops.fvops.barrier(1, group.unique_name)
        return x + 1

    return program


def _refusals() -> list[str]:
    """What a barrier and a first use say inside a capture, and whether the group still works afterwards."""
    import fvops

    told = []
    for suffix, warmed in (("warmed", True), ("cold", False)):
        group = fvops.initialize_sequence_parallel_group(1, group_name_suffix=suffix)
        if warmed:
            warm(group)
        x = input_of(0, group.device)
        try:
            _captured(group, _barrier_inside(group) if warmed else _program("all_reduce", group), x)
        except RuntimeError as error:
            told.append(str(error))
        torch.cuda.synchronize()
        told.append(str(torch.equal(OPS["all_reduce"](x, group.unique_name), x)))
        group.destroy()
    return told


@on_gpu
def test_refusals_inside_a_capture() -> None:
    barrier, works, first, still_works = Ranks.get(1, "gpu-nccl").run(_refusals)[0]
    assert "fvops.barrier on group 'sp_warmed:0'" in barrier
    assert "cannot be part of a CUDA graph" in barrier
    assert "fvops.all_reduce on group 'sp_cold:0'" in first
    assert "its first use is inside a CUDA-graph capture" in first
    assert works == still_works == "True"


def _with_barrier(x: Tensor, g: str) -> Tensor:
    y = OPS["all_to_all_4D"](x * 2, g)
    torch.ops.fvops.barrier(1, g)
    y = OPS["all_reduce"](y + 1, g)
    a, b = torch.ops.fvops.all_to_all_4D_coalesced([y, y * 3], 1, 2, 1, g)
    return OPS["all_gather"](a + b, g)


def _compiled() -> tuple[list[str], list[list[str]]]:
    """What is wrong with the values of a compiled program, and what each call recorded."""
    from fvops.debug import record_collectives

    group = group_of_one()
    warm(group)
    name = group.unique_name
    compiled = torch.compile(lambda x: _with_barrier(x, name), mode="reduce-overhead", fullgraph=True)
    wrong, recorded = [], []
    for seed in range(5):
        x = input_of(seed, group.device)
        with record_collectives() as records:
            y = compiled(x).clone()
        if not torch.equal(bits(y), bits(_with_barrier(x, name))):
            wrong.append(f"call {seed}")
        recorded.append([record.op for record in records])
    torch._dynamo.reset()  # the graphs go before the communicator
    return wrong, recorded


EVERYTHING = ["all_to_all_4D", "barrier", "all_reduce", "all_to_all_4D_coalesced", "all_gather"]


@pytest.mark.slow
def test_the_compiled_program_on_cpu() -> None:
    assert Ranks.get(1, "nccl").run(_compiled, deadline_s=300) == [([], [EVERYTHING] * 5)]


@on_gpu
def test_reduce_overhead_replays_and_keeps_the_barrier_between() -> None:
    ((wrong, recorded),) = Ranks.get(1, "gpu-nccl").run(_compiled, deadline_s=240)
    assert not wrong
    assert recorded[0] == EVERYTHING
    # Once there are graphs a replay runs no Python; only the barrier, which no graph holds, still does.
    assert recorded[-1] == ["barrier"]
