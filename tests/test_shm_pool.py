"""Leases: a block is nobody else's while anything of its tensor lives, and is leased again when nothing does."""

from __future__ import annotations

import gc
import itertools
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fvops.device_communicators.shm.pool import Pool
from fvops.device_communicators.shm.segment import Segment
from fvops.device_communicators.shm.segment_layout import COLLECTIVES, MESSAGES, SLOTS, SegmentLayout
from tests.draws import profile
from tests.harness import Ranks
from tests.shm_calls import fresh_transport

KB = 1 << 10


def _pool(folder: Path, room: int) -> tuple[Segment, Pool]:
    layout = SegmentLayout(2, 64, SegmentLayout(2, 64, 0).pool_start + room)
    descriptor = os.open(folder / "segment", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(descriptor, layout.segment_bytes)
    segment = Segment(descriptor, layout)
    return segment, Pool(segment, descriptor)


@pytest.fixture
def folder() -> Iterator[Path]:
    """In /dev/shm: a pool takes nothing from a file system that is three quarters full, as a disk may be."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


@pytest.fixture
def pool(folder: Path) -> Iterator[Pool]:
    """A pool of 64 KB."""
    _, pool = _pool(folder, 64 * KB)
    yield pool
    pool.close()


def _empty(pool: Pool, nbytes: int) -> Tensor:
    tensor = pool.empty((nbytes,), torch.uint8)
    assert tensor is not None
    return tensor


def test_a_lease_lives_as_long_as_any_view(pool: Pool) -> None:
    x = pool.empty((4, 8), torch.float32)
    assert x is not None
    assert (x.shape, x.stride(), x.dtype, x._is_view()) == ((4, 8), (8, 1), torch.float32, False)
    address, view = x.data_ptr(), x.t()[1:].flatten(0)[3:]
    view = x.view(torch.int32)[2:, 1]
    x.fill_(7)
    del x
    assert pool.leased_bytes() == 128
    other = _empty(pool, 128)
    assert other.data_ptr() != address
    other.zero_()
    assert view.view(torch.float32).tolist() == [7.0, 7.0]
    del view
    assert _empty(pool, 128).data_ptr() == address


def test_autograd_keeps_a_lease(pool: Pool) -> None:
    x = pool.empty((16,), torch.float32)
    assert x is not None
    weight = torch.ones(16, requires_grad=True)
    y = (weight * x.fill_(3)).sum()
    del x
    gc.collect()
    assert pool.leased_bytes() == 64
    _empty(pool, 64).fill_(9)
    y.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [3.0] * 16
    del y
    assert pool.leased_bytes() == 0


def test_in_place_writes_and_storage_swaps(pool: Pool) -> None:
    x = _empty(pool, 64).fill_(1)
    y = torch.zeros(3, dtype=torch.uint8)
    y.set_(x.untyped_storage(), 8, (4,), (2,))
    x.add_(4).mul_(2)
    x.data = torch.empty(5, dtype=torch.uint8)
    assert (y.tolist(), pool.leased_bytes()) == ([10] * 4, 64)
    y.requires_grad_(False).detach_()
    del y
    assert pool.leased_bytes() == 0


def test_a_lease_can_be_given_up_on_any_thread(pool: Pool) -> None:
    held = [_empty(pool, 64) for _ in range(100)]
    threads = [threading.Thread(target=lambda part=part: held.__delitem__(slice(part))) for part in (30, 30, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (held, pool.leased_bytes()) == ([], 0)


def test_a_cycle_that_dies_while_the_pool_is_at_work(pool: Pool) -> None:
    class Node:
        def __init__(self, tensor: Tensor) -> None:
            self.me, self.tensor = self, tensor

    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(2000):
            Node(_empty(pool, 4 * KB))
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert pool.leased_bytes() == 0


def test_an_exhausted_pool_gives_none_and_recovers(pool: Pool) -> None:
    held = []
    while (tensor := pool.empty((8 * KB,), torch.uint8)) is not None:
        held.append(tensor)
    assert len(held) == 8
    assert pool.empty((1,), torch.uint8) is None
    del held[2:4], tensor
    # Two neighbours are one block when that is asked for; and one block is cut.
    large = _empty(pool, 16 * KB)
    assert pool.empty((64,), torch.uint8) is None
    del large
    small = [_empty(pool, 4 * KB) for _ in range(4)]
    assert pool.empty((64,), torch.uint8) is None
    del small, held
    assert _empty(pool, 64 * KB).numel() == 64 * KB


def test_results_outlive_the_pool_and_nothing_is_leased_after_close(folder: Path) -> None:
    segment, pool = _pool(folder, 64 * KB)
    x = _empty(pool, 100).fill_(5)
    pool.close()
    assert pool.empty((1,), torch.uint8) is None
    del pool, segment
    gc.collect()
    assert x.sum() == 500


@profile(60)
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from([1, 63, 64, 65, 1000, 4096, 5000, 20_000])), max_size=60
    )
)
def test_leases_never_overlap(folder: Path, steps: list[tuple[int, int]]) -> None:
    _, pool = _pool(folder, 64 * KB)
    held: dict[int, tuple[Tensor, int]] = {}
    for number, (slot, nbytes) in enumerate(steps):
        held.pop(slot, None)
        tensor = pool.empty((nbytes,), torch.uint8)
        if tensor is not None:
            held[slot] = tensor.fill_(number), number
        assert all(bool((x == value).all()) for x, value in held.values())
    held.clear()
    tensor = None
    assert pool.leased_bytes() == 0
    assert pool.empty((64 * KB,), torch.uint8) is not None
    pool.close()


@pytest.mark.parametrize("places", [2, 3, 8, 64])
def test_nothing_of_a_segment_overlaps(places: int) -> None:
    layout = SegmentLayout(places, 192, 0)
    words = [(0, 1), (1, 2), (16, 18), (32, 33)]
    slots = []
    for source in range(places):
        words.append((layout.flag(source), layout.flag(source) + 1))
        for kind in (COLLECTIVES, MESSAGES):
            channel = layout.channel(kind, source)
            words += [(channel.pushed, channel.pushed + 1), (channel.drained, channel.drained + 1)]
            words.append((channel.headers, channel.headers + 4 * SLOTS))
            slots.append((channel.slots, channel.slots + SLOTS * channel.slot_bytes))
    words.append((2 * layout.table, 2 * layout.table + 4 * 512))
    for spans, end in ((sorted(words), layout.control_bytes // 4), (sorted(slots), layout.pool_start)):
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
        assert spans[-1][1] <= end
    assert slots[0][0] >= layout.control_bytes


def _hold_results(rounds: int) -> dict[str, Any]:
    """Results of many exchanges held, some dropped, in a pool that holds three of them."""
    from fvops.kernels import layout

    with fresh_transport(segment_bytes=1 << 20, slot_bytes=4096, eager_bytes=0) as transport:
        P, rank = transport.world_size, transport.rank
        held, wrong, pooled = [], [], 0
        for number in range(rounds):
            x = torch.full((1, 64, P, 64), 1000.0 * rank + number)
            y = transport.empty((1, 64 * P, 1, 64), torch.float32)
            pooled += transport._own.offset_of(y) > 0
            transport.exchange([layout.sequence_by_rank(y, P)], [layout.heads_by_rank(x, P)])
            held.append((y if number % 2 else y[:, ::7], number))
            if len(held) > 40 + 10 * rank:
                del held[number % 5 :: 2]
            if number % 15 != 14:
                continue
            wrong += [
                number
                for y, number in held
                if sorted(set(y.flatten().tolist())) != [1000.0 * j + number for j in range(P)]
            ]
        transport.barrier()
        return {"wrong": wrong, "pooled": pooled}


def test_held_results_are_left_alone_by_peers(ranks: Ranks) -> None:
    for told in ranks.run(_hold_results, 90):
        assert told["wrong"] == []
        assert 0 < told["pooled"] < 90


def _compiled() -> list[float]:
    """A compiled function and a backward over a pooled result."""
    with fresh_transport(eager_bytes=0) as transport:
        x = transport.empty((256,), torch.float32)
        transport.broadcast(x, torch.arange(256.0) + transport.rank, 0)
        x.requires_grad_()
        f = torch.compile(lambda x: (x * x).sin().sum(), backend="aot_eager")
        f(x).backward()
        assert x.grad is not None
        wanted = 2 * torch.arange(256.0) * (torch.arange(256.0) ** 2).cos()
        return [float((x.grad - wanted).abs().max())]


def test_a_pooled_result_is_a_leaf_for_compiled_code(two_ranks: Ranks) -> None:
    assert two_ranks.run(_compiled) == [[0.0], [0.0]]
