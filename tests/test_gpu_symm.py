"""The one-sided exchange on real symmetric memory: 2 and 4 ranks that share one GPU, eager, captured and given up.

Without a GPU the same transport and kernels run in tests/test_push_transport.py and
tests/test_push_interpreted.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests import reference
from tests.devices import GPU, on_device, on_gpu
from tests.draws import ALL_DTYPES, LAYOUTS, bits, make
from tests.harness import Ranks

MODES = ((2, 1), (1, 2))


@pytest.fixture(params=[pytest.param(2, id="P2", marks=GPU), pytest.param(4, id="P4", marks=GPU)])
def sharing(request: pytest.FixtureRequest) -> Ranks:
    return Ranks.get(request.param, "gpu-symm")


def _group() -> Any:
    import fvops
    from fvops import registry
    from fvops.device_communicators.symmetric_transport import SymmetricTransport

    group = fvops.get_sp_group()
    transport = registry.resolve(group.unique_name, group.world_size).transport
    assert isinstance(transport, SymmetricTransport), transport.name
    return group


def _input(group: Any, rank: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    P = group.world_size
    return make((2, 3 * P, 2 * P, 24), dtype, LAYOUTS[(rank + seed) % len(LAYOUTS)], 100 * seed + rank, numbers=True)


def _expected(group: Any, seed: int, mode: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    inputs = [_input(group, rank, seed, dtype) for rank in range(group.world_size)]
    return reference.all_to_all_4D(inputs, *mode)[group.rank_in_group]


def _mine(group: Any, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return on_device(_input(group, group.rank_in_group, seed, dtype), group.device)


def _values() -> list[str]:
    group, wrong = _group(), []
    for seed, dtype in enumerate(ALL_DTYPES):
        for mode in MODES:
            got = group.all_to_all_4D(_mine(group, seed, dtype), *mode)
            if not torch.equal(bits(got.cpu()), bits(_expected(group, seed, mode, dtype))):
                wrong.append(f"{dtype}, {mode}")
    dtypes = (torch.bfloat16, torch.float32, torch.float8_e4m3fn)
    together = group.all_to_all_4D_coalesced([_mine(group, i, dtype) for i, dtype in enumerate(dtypes)], 2, 1)
    for i, (got, dtype) in enumerate(zip(together, dtypes, strict=True)):
        if not torch.equal(bits(got.cpu()), bits(_expected(group, i, (2, 1), dtype))):
            wrong.append(f"coalesced {dtype}")
    return wrong


def test_values(sharing: Ranks) -> None:
    assert sharing.run(_values) == [[]] * sharing.world_size


def _rounds(count: int) -> list[int]:
    """Exchanges in a row, never waiting on the host, with work of another length on each rank between them."""
    group = _group()
    generator = torch.Generator().manual_seed(group.rank_in_group)
    work = torch.ones(1 << 20, device=group.device)
    P, results = group.world_size, []
    for number in range(count):
        for _ in range(int(torch.randint(0, 20, (), generator=generator))):
            work.mul_(1.0)
        x = torch.full((1, 16, P, 64), float(number * P + group.rank_in_group), device=group.device)
        results.append(group.all_to_all_4D(x))
    wanted = torch.arange(P, dtype=torch.float32, device=group.device).repeat_interleave(16).view(1, -1, 1, 1)
    return [number for number, y in enumerate(results) if not bool((y == wanted + number * P).all())]


def test_rounds_that_race(sharing: Ranks) -> None:
    assert sharing.run(_rounds, 200) == [[]] * sharing.world_size


def _grows() -> bool:
    group = _group()
    P = group.world_size
    right = True
    for rows in (1 << 10, 1 << 13, 1 << 12):
        x = torch.full((1, rows, P, 128), float(group.rank_in_group), device=group.device, dtype=torch.bfloat16)
        y = group.all_to_all_4D(x)
        wanted = torch.arange(P, device=group.device).repeat_interleave(rows).view(1, -1, 1, 1)
        right = right and bool((y == wanted).all())
    return right


def test_the_buffer_grows(sharing: Ranks) -> None:
    assert sharing.run(_grows) == [True] * sharing.world_size


def _three(group: Any, x: Tensor) -> Tensor:
    """Three exchanges, so that a replay begins in the other slot than the one before it."""
    y = group.all_to_all_4D(x * 2, 2, 1)
    y = group.all_to_all_4D(y + 1, 1, 2)
    return group.all_to_all_4D(y, 2, 1)


def _replays() -> list[str]:
    group, wrong = _group(), []
    P = group.world_size
    shape = (1, 32, 2 * P, 64)
    group.warmup([shape], torch.float32)
    static = torch.zeros(shape, device=group.device)
    _three(group, static)
    graph = torch.cuda.CUDAGraph()
    with group.graph_capture() as context:
        with torch.cuda.graph(graph, stream=context.stream):
            output = _three(group, static)
    for seed in range(6):
        value = make(shape, torch.float32, "contiguous", 10 * seed + group.rank_in_group, numbers=True)
        static.copy_(value)
        graph.replay()
        if not torch.equal(output, _three(group, static)):
            wrong.append(f"replay {seed} differs from eager")
    too_large = torch.zeros(1, 1 << 15, P, 128, device=group.device)
    try:
        with group.graph_capture() as context:
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=context.stream):
                group.all_to_all_4D(too_large)
        wrong.append("a capture grew the buffer")
    except RuntimeError as error:
        if "cannot grow inside a CUDA-graph capture" not in str(error):
            wrong.append(str(error))
    torch.cuda.synchronize()
    return wrong


def test_replays_equal_eager(sharing: Ranks) -> None:
    assert sharing.run(_replays) == [[]] * sharing.world_size


def _reduce_overhead() -> list[int]:
    group = _group()
    group.warmup([(1, 32, 2 * group.world_size, 64)], torch.float32)
    compiled = torch.compile(lambda x: _three(group, x), mode="reduce-overhead", fullgraph=True)
    wrong = []
    for seed in range(5):
        x = torch.full((1, 32, 2 * group.world_size, 64), float(seed + group.rank_in_group), device=group.device)
        if not torch.equal(compiled(x).clone(), _three(group, x)):
            wrong.append(seed)
    torch._dynamo.reset()
    return wrong


@on_gpu
def test_reduce_overhead() -> None:
    assert Ranks.get(2, "gpu-symm").run(_reduce_overhead, deadline_s=200) == [[], []]


def _stays_away() -> list[Any]:
    """Place 0 does not come: the others' wait ends with a void result, and their next call names it."""
    from fvops import registry

    group = _group()
    transport = registry.resolve(group.unique_name, group.world_size).transport
    transport._watchdog._deadline_s = 3.0
    told: list[Any] = []
    if group.rank_in_group:
        x = torch.ones(1, 2, group.world_size, 3, device=group.device)
        told.append(bool(group.all_to_all_4D(x).isnan().all()))
        try:
            group.all_to_all_4D(x)
        except RuntimeError as error:
            told.append(str(error))
    dist.barrier(group.cpu_group)
    return told


@on_gpu
def test_a_wait_on_the_device_is_given_up_and_reported() -> None:
    ranks = Ranks.get(2, "gpu-symm")
    try:
        first, (void, text) = ranks.run(_stays_away)
    finally:
        ranks.kill()  # its group can be used no more
    assert first == []
    assert void
    assert "missing: place 0 (global rank 0)" in text
