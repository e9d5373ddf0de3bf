"""Promises 1 and 3: everything traces with fullgraph=True, and gives eager's numbers and eager's collectives."""

from __future__ import annotations

import pytest
import torch

import fvops
from compile_tests.programs import BACKENDS, INFERENCE, TRAINING, Program, compare, example
from tests.harness import Ranks, init_fvops


def _programs(backend: str, train: bool, tp_size: int, together: bool) -> list[str]:
    """Each program alone, or all in one graph (with Inductor a graph costs seconds, and there are dozens)."""
    fvops.cleanup_dist_env_and_memory()
    init_fvops(tp_size=tp_size, suffix="-tp")
    group = fvops.get_sp_group()
    x = example(group.world_size, group.rank_in_group)
    programs = TRAINING if train else INFERENCE
    todo = {"all in one graph": _all_of(programs)} if together else programs
    for name, program in todo.items():
        torch._dynamo.reset()
        compiled = torch.compile(program, backend=backend, fullgraph=True)
        with torch.set_grad_enabled(train):
            compare(f"{name} on {backend}", program, compiled, x, train)
    fvops.cleanup_dist_env_and_memory()
    return list(programs)


def _all_of(programs: dict[str, Program]) -> Program:
    chosen = list(programs.values())
    return lambda x: torch.cat([program(x).flatten() for program in chosen])


def _moved_bytes_exactly(backend: str) -> None:
    """Bitwise where data only moves: no elementwise code around the exchange, every dtype that has bytes."""
    group = fvops.get_sp_group()
    P = group.world_size
    moves = {
        "all_gather": lambda x: group.all_gather(x, 1),
        "all_to_all_4D": lambda x: group.all_to_all_4D(group.all_to_all_4D(x), 1, 2),
        "all_to_all_single": lambda x: group.all_to_all_single(x.transpose(0, 1)),
        "shard": lambda x: group.shard(x, 1, scale_grad=False),
        "broadcast": lambda x: torch.ops.fvops.broadcast(x, 1, P, group.unique_name),
        "gather": lambda x: x if (gathered := group.gather(x, 0, 1)) is None else gathered,
        "send and recv": lambda x: (group.send(x), group.recv(x.shape, x.dtype))[1],
    }
    dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.int16, torch.int64, torch.bool, torch.float8_e4m3fn)
    inputs = [(example(P, group.rank_in_group) * 4).to(dtype) for dtype in dtypes]
    for name, move in moves.items():
        torch._dynamo.reset()
        compiled = torch.compile(lambda xs, move=move: [move(x) for x in xs], backend=backend, fullgraph=True)
        for x, got in zip(inputs, compiled(inputs), strict=True):
            if not torch.equal(got.view(torch.uint8), move(x).view(torch.uint8)):
                raise AssertionError(f"{name} of {x.dtype} on {backend} differs")


TRAIN = pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
WORLDS = pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])


@TRAIN
@WORLDS
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_every_method_helper_and_getter_traces_whole(world_size: int, train: bool, backend: str) -> None:
    ran = Ranks.get(world_size).run(_programs, backend, train, world_size, False, deadline_s=300)
    assert set(ran[0]) == set(TRAINING if train else INFERENCE)


@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["inference", "training"])
@WORLDS
def test_inductor_compiles_all_of_them_in_one_graph(world_size: int, train: bool) -> None:
    Ranks.get(world_size).run(_programs, "inductor", train, world_size, True, deadline_s=300)


@pytest.mark.slow
@TRAIN
@WORLDS
def test_inductor_compiles_each_of_them(world_size: int, train: bool) -> None:
    Ranks.get(world_size).run(_programs, "inductor", train, world_size, False, deadline_s=900)


@pytest.mark.parametrize("backend", BACKENDS)
def test_data_movement_is_bitwise(two_ranks: Ranks, backend: str) -> None:
    two_ranks.run(_moved_bytes_exactly, backend, deadline_s=300)
