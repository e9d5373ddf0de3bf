"""Exchanges in C (`shm/mover.c`): large rows past the cache, what a wait inside it is told, and that it was C at all.

The values of small ones in every configuration: tests/test_shm_collectives.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fvops.device_communicators.shm import mover
from fvops.device_communicators.shm.mover import compiled
from fvops.device_communicators.shm.mover_plans import MoverOptions
from tests import reference
from tests.draws import LAYOUTS, bits, make
from tests.harness import RankFailure, Ranks
from tests.shm_calls import fresh_transport

needs_extension = pytest.mark.skipif(compiled() is None, reason="fvops was installed without its extension")
# Rows on both sides of what is streamed, of sizes and offsets that no vector divides; B, S/P, H/P, D, dtype.
SHAPES = [
    (1, 40, 3, 128, torch.float32),
    (2, 17, 1, 333, torch.uint8),
    (1, 9, 2, 127, torch.bfloat16),
    (2, 5, 3, 24, torch.complex64),
    (1, 33, 1, 255, torch.int8),
    (3, 4, 2, 100, torch.float8_e4m3fn),
]
WAYS = {"channels": {}, "straight": {"eager_bytes": 0}}


def test_it_is_compiled_where_it_can_be() -> None:
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not shutil.which("cc") or not header.exists():
        pytest.skip(f"no C compiler, or no {header}")
    assert compiled() is not None


def test_an_extension_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        pass

    monkeypatch.setattr(mover.importlib, "import_module", lambda name: Old)
    assert "install fvops again" in mover.why_not_compiled.__wrapped__()


def _input(rank: int, number: int, P: int, scatter_dim: int) -> Tensor:
    B, s, h, D, dtype = SHAPES[number]
    shape = (B, s, P * h, D) if scatter_dim == 2 else (B, P * s, h, D)
    return make(shape, dtype, LAYOUTS[(rank + number) % len(LAYOUTS)], 10 * number + rank)


def _large_rows(way: str, streamed_bytes: int) -> dict[tuple[int, int], Tensor]:
    """Each shape both ways, one by one and then all together; no call may go the way in Python."""
    options = MoverOptions(shortest_row=1, streamed_bytes=streamed_bytes)
    results = {}
    with fresh_transport(options=options, **WAYS[way]) as transport:
        transport._move = None
        P, rank = transport.world_size, transport.rank
        for scatter_dim in (2, 1):
            inputs = [_input(rank, number, P, scatter_dim) for number in range(len(SHAPES))]
            outputs = [_output(transport, x, scatter_dim) for x in inputs]
            for number, (x, y) in enumerate(zip(inputs, outputs, strict=True)):
                transport.exchange_4D([y], [x], scatter_dim)
                results[scatter_dim, number] = y.clone()
                y.view(torch.uint8).fill_(0xA5)
            transport.exchange_4D(outputs, inputs, scatter_dim)
            for number, y in enumerate(outputs):
                assert torch.equal(bits(y), bits(results[scatter_dim, number])), (scatter_dim, number)
        transport.barrier()
    return results


def _output(transport: Any, x: Tensor, scatter_dim: int) -> Tensor:
    P = transport.world_size
    B, S, H, D = x.shape
    return transport.empty((B, S * P, H // P, D) if scatter_dim == 2 else (B, S // P, H * P, D), x.dtype)


@needs_extension
@pytest.mark.parametrize("streamed_bytes", [0, 1 << 40], ids=["streamed", "cached"])
@pytest.mark.parametrize("way", WAYS)
def test_large_rows_of_any_layout(ranks: Ranks, way: str, streamed_bytes: int) -> None:
    P = ranks.world_size
    told = ranks.run(_large_rows, way, streamed_bytes)
    for scatter_dim in (2, 1):
        for number in range(len(SHAPES)):
            inputs = [_input(rank, number, P, scatter_dim).contiguous() for rank in range(P)]
            wanted = reference.all_to_all_4D(inputs, scatter_dim, 3 - scatter_dim)
            for rank in range(P):
                assert torch.equal(bits(told[rank][scatter_dim, number]), bits(wanted[rank])), (scatter_dim, number)


def _gathered(way: str) -> list[Tensor]:
    with fresh_transport(options=MoverOptions(shortest_row=1), **WAYS[way]) as transport:
        transport._move = None
        told = []
        for dim in range(3):
            x = make((5, 3, 70), torch.float32, LAYOUTS[transport.rank % len(LAYOUTS)], transport.rank)
            shape = [size * transport.world_size if axis == dim else size for axis, size in enumerate(x.shape)]
            y = transport.empty(shape, x.dtype)
            transport.all_gather_along(y, x, dim)
            told.append(y.clone())
        transport.barrier()
        return told


@needs_extension
@pytest.mark.parametrize("way", WAYS)
def test_all_gather_along_any_dim(ranks: Ranks, way: str) -> None:
    P = ranks.world_size
    inputs = [make((5, 3, 70), torch.float32, LAYOUTS[rank % len(LAYOUTS)], rank).contiguous() for rank in range(P)]
    for told in ranks.run(_gathered, way):
        for dim, y in enumerate(told):
            assert torch.equal(bits(y), bits(torch.cat(inputs, dim)))


def _left_to_python() -> list[str]:
    """What C does not take goes the other way, and gives the same."""
    wrong = []
    with fresh_transport(eager_bytes=0) as transport:
        P, rank = transport.world_size, transport.rank
        for name, x, taken in (
            ("short rows", torch.arange(8 * P).view(1, 4, 2 * P, 1) + 100 * rank, False),
            ("rows of 32 bytes", torch.arange(16 * P).view(1, 4, P, 4) + 100 * rank, True),
            ("conjugated", torch.arange(64 * P).view(1, 4, P, 16).to(torch.complex64).mul(1j).conj(), False),
            ("no elements", torch.zeros(1, 0, P, 16), False),
            ("no memory", torch._efficientzerotensor((1, 4, P, 16)), False),
        ):
            y = _output(transport, x, 2)
            if transport._mover.exchange_4D(1, [y], [x], 2) != taken:
                wrong.append(f"{name}: taken should be {taken}")
            transport.exchange_4D([y], [x], 2)
            apart = 0 if x.is_complex() or x._is_zerotensor() else 100
            parts = [x.resolve_conj().clone() + apart * (j - rank) for j in range(P)]
            n = x.size(2) // P
            if not torch.equal(y, torch.cat([part[:, :, n * rank : n * (rank + 1)] for part in parts], 1)):
                wrong.append(f"{name}: wrong values")
        transport.barrier()
    return wrong


@needs_extension
def test_what_c_does_not_take(ranks: Ranks) -> None:
    assert ranks.run(_left_to_python) == [[]] * ranks.world_size


def _exchange(transport: Any, width: int = 16) -> None:
    x = torch.ones(1, 4, transport.world_size, width)
    transport.exchange_4D([_output(transport, x, 2)], [x], 2)


def _die(folder: str, way: str) -> None:
    """Place 1 kills itself while the others wait for it in C."""
    with fresh_transport(**WAYS[way]) as transport:
        _exchange(transport)
        transport._move = None
        if transport.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        told = _error_of(transport, 16)
        with pytest.raises(RuntimeError, match="broken since an earlier error"):
            _exchange(transport)
        Path(folder, f"{transport.rank}").write_text(told)


def _error_of(transport: Any, width: int) -> str:
    """What the exchange is told; there must be something."""
    with pytest.raises(RuntimeError) as caught:
        _exchange(transport, width)
    return str(caught.value)


@needs_extension
@pytest.mark.parametrize("way", WAYS)
def test_a_death_is_told(tmp_path: Path, way: str) -> None:
    with pytest.raises(RankFailure, match="exit code -9"):
        Ranks.get(3).run(_die, str(tmp_path), way, deadline_s=60)
    for place in (0, 2):
        told = (tmp_path / f"{place}").read_text()
        assert "place 1" in told
        assert "has died" in told or "gave up waiting for place 1" in told


def _disagree(way: str, kind: str) -> str:
    import fvops

    with fresh_transport(timeout_s=5.0, **WAYS[way]) as transport:
        transport._move = None
        P, rank = transport.world_size, transport.rank
        if kind == "ops" and rank == 0:
            with pytest.raises(RuntimeError) as caught:
                transport.all_gather_along(transport.empty((P, 4, 16), torch.float32), torch.ones(1, 4, 16), 0)
            text = str(caught.value)
        else:
            text = _error_of(transport, 16 if kind == "ops" else 16 + 16 * rank)
        fvops.get_sp_group().barrier()
        return text


@needs_extension
@pytest.mark.parametrize("kind", ["ops", "sizes"])
@pytest.mark.parametrize("way", WAYS)
def test_ranks_that_call_different_things_are_told_so(two_ranks: Ranks, way: str, kind: str) -> None:
    texts = two_ranks.run(_disagree, way, kind)
    assert any("every rank must issue the same call" in text for text in texts), texts
    assert all("place" in text for text in texts)


SUMMED = (torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.uint32, torch.int64)


def _sums(how: str, sizes: list[int]) -> list[str]:
    """Which sums and averages differ by a bit from those of a transport without C."""
    import fvops

    odd = fvops.get_sp_group().rank_in_group % 2
    in_c = not (how == "mixed" and odd)
    # Slots of 4 KB: several pieces each. "uneven": odd places have no pool, so their results come through the channels.
    limits = {"slot_bytes": 4096, "segment_bytes": 64 << 10 if how == "uneven" else 16 << 20}
    wrong, hogs = [], []
    with (
        fresh_transport(options=MoverOptions(wanted=in_c), **limits) as transport,
        fresh_transport(options=MoverOptions(wanted=False)) as other,
    ):
        P, rank = transport.world_size, transport.rank
        if how == "uneven" and odd:
            while (hog := transport._pool.empty((64,), torch.uint8)) is not None:
                hogs.append(hog)
        elif in_c and how != "uneven":
            transport._reductions.run = None
        for seed, dtype in enumerate(SUMMED):
            for size in sizes:
                for op in ("sum", "avg") if dtype.is_floating_point else ("sum",):
                    x = make((size * P, 3), dtype, "contiguous", 1000 * seed + rank, numbers=dtype.is_floating_point)
                    for name in ("all_reduce", "reduce_scatter"):
                        like = x if name == "all_reduce" else x[:size]
                        results = [way.like(like) for way in (transport, other)]
                        for way, y in zip((transport, other), results, strict=True):
                            getattr(way, name)(y, x if name == "all_reduce" else x.view(P, size, 3), op)
                        if not torch.equal(bits(results[0]), bits(results[1])):
                            wrong.append(f"{name} {op} of {size} {dtype}")
        transport.barrier()
        other.barrier()
    return wrong


@needs_extension
@pytest.mark.parametrize("how", ["alike", "mixed", "uneven"])
def test_sums_have_the_bits_of_those_in_python(ranks: Ranks, how: str) -> None:
    # Together and in shares; one piece, several, and a last one that is shorter.
    assert ranks.run(_sums, how, [1, 5, 340, 341, 1000, 20_011]) == [[]] * ranks.world_size


def _other_sums() -> list[str]:
    """What is left to Python: other reductions, dtypes and layouts."""
    wrong = []
    with fresh_transport() as transport:
        P, rank = transport.world_size, transport.rank
        for op, dtype in (
            ("max", torch.float32),
            ("product", torch.int64),
            ("sum", torch.float16),
            ("sum", torch.int8),
        ):
            x = torch.full((40,), rank + 1, dtype=dtype)
            y = transport.empty((40,), dtype)
            if transport._mover.all_reduce(5, y, x, op, True):
                wrong.append(f"{op} of {dtype} was taken")
            transport.all_reduce(y, x, op)
            wanted = {"max": P, "product": torch.arange(1, P + 1).prod(), "sum": P * (P + 1) // 2}[op]
            if not bool((y == wanted).all()):
                wrong.append(f"{op} of {dtype}: {y[0]}")
        x = torch.arange(12.0).view(3, 4).t() + rank
        y = transport.empty((4, 3), torch.float32)
        transport.all_reduce(y, x, "sum")
        if not torch.equal(y, P * torch.arange(12.0).view(3, 4).t() + P * (P - 1) / 2):
            wrong.append("transposed")
        transport.barrier()
    return wrong


@needs_extension
def test_reductions_that_c_does_not_take(ranks: Ranks) -> None:
    assert ranks.run(_other_sums) == [[]] * ranks.world_size


def _unlike_sums(way: str, size: int) -> str:
    import fvops

    with fresh_transport(timeout_s=5.0, **WAYS[way]) as transport:
        n = size + transport.world_size * (transport.rank == 0)
        with pytest.raises(RuntimeError) as caught:
            transport.all_reduce(transport.empty((n,), torch.float32), torch.ones(n), "sum")
        fvops.get_sp_group().barrier()
        return str(caught.value)


@needs_extension
@pytest.mark.parametrize("size", [100, 400_000], ids=["one piece", "shares"])
@pytest.mark.parametrize("way", WAYS)
def test_sums_of_unlike_sizes_are_told(two_ranks: Ranks, way: str, size: int) -> None:
    texts = two_ranks.run(_unlike_sums, way, size)
    assert any("every rank must issue the same call" in text for text in texts), texts
    assert all("place" in text for text in texts)
