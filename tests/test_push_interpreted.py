"""The push kernel and its signals under Triton's interpreter, over shared memory between processes that race.

Every rank makes all ranks' inputs from their seeds, so what it must receive comes from `tests.reference`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import reference
from tests.draws import ALL_DTYPES, LAYOUTS, bits, make, profile, storage_bits
from tests.harness import RankFailure, Ranks
from tests.symmetric_double import SharedBuffer, delays, interpreted

pytest.importorskip("triton")

MODES = ((2, 1), (1, 2))
Spec = tuple[tuple[int, int, int, int], torch.dtype]  # (B, s, h, D) of one tensor, and its dtype


_kept: list[SharedBuffer] = []  # whose mappings the kernels write to


def _room(slot_bytes: int) -> Any:
    import fvops

    interpreted()
    buffer = SharedBuffer(fvops.get_sp_group().cpu_group, torch.device("cpu"), slot_bytes)
    buffer.connect(60.0)
    _kept[:] = [buffer]
    return buffer.room


def _inputs(specs: Sequence[Spec], mode: tuple[int, int], P: int, rank: int, seed: int) -> list[Tensor]:
    """What place `rank` sends in exchange number `seed`; the layouts differ from rank to rank."""
    inputs = []
    for i, ((B, s, h, D), dtype) in enumerate(specs):
        shape = (B, s, P * h, D) if mode == (2, 1) else (B, P * s, h, D)
        inputs.append(make(shape, dtype, LAYOUTS[(rank + i + seed) % len(LAYOUTS)], 1000 * seed + 10 * rank + i))
    return inputs


def _exchange(room: Any, specs: Sequence[Spec], mode: tuple[int, int], seed: int, elements: int = 64) -> list[str]:
    """Exchange, and say what is wrong with what came."""
    from fvops.kernels import layout, push
    from fvops.kernels.parts_plan import CopyConfig

    P, place = room.world_size, room.place
    views = {2: layout.heads_by_rank, 1: layout.sequence_by_rank}
    inputs = _inputs(specs, mode, P, place, seed)
    before = [storage_bits(x) for x in inputs]
    outputs = []
    for (B, s, h, D), dtype in specs:
        outputs.append(torch.zeros((B, P * s, h, D) if mode == (2, 1) else (B, s, P * h, D), dtype=dtype))
    push.exchange(
        room,
        [views[mode[1]](y, P) for y in outputs],
        [views[mode[0]](x, P) for x in inputs],
        CopyConfig(elements_per_program=elements),
    )
    everyone = [_inputs(specs, mode, P, rank, seed) for rank in range(P)]
    wrong = [
        f"exchange {seed}: the input was written to"
        for x, old in zip(inputs, before, strict=True)
        if (storage_bits(x) != old).any()
    ]
    for i, output in enumerate(outputs):
        expected = reference.all_to_all_4D([tensors[i] for tensors in everyone], *mode)[place]
        if not torch.equal(bits(output), bits(expected)):
            wrong.append(f"exchange {seed}, tensor {i} of {specs[i]}, mode {mode}")
    return wrong


# Any tensors -------------------------------------------------------------------------------------------------------

_specs = st.lists(
    st.tuples(
        st.tuples(st.integers(1, 2), st.sampled_from([0, 1, 3, 5]), st.integers(1, 3), st.sampled_from([1, 3, 8])),
        st.sampled_from([*ALL_DTYPES, torch.complex128]),
    ),
    min_size=1,
    max_size=3,
)


def _any_tensors(drawn: list[tuple[list[Spec], tuple[int, int], int]]) -> list[str]:
    room = _room(1 << 16)
    return [
        text
        for seed, (specs, mode, elements) in enumerate(drawn)
        for text in _exchange(room, specs, mode, seed, elements)
    ]


@profile(1)
@given(st.lists(st.tuples(_specs, st.sampled_from(MODES), st.sampled_from([2, 16, 1024])), min_size=6, max_size=6))
def test_any_tensors(ranks: Ranks, drawn: Any) -> None:
    assert ranks.run(_any_tensors, drawn) == [[]] * ranks.world_size


# Races -------------------------------------------------------------------------------------------------------------


class _Slow:
    """A kernel whose launches are late by chance."""

    def __init__(self, kernel: Any, sleep: Any) -> None:
        self._kernel, self._sleep = kernel, sleep

    def __getitem__(self, grid: Any) -> Any:
        self._sleep()
        return self._kernel[grid]


RACING: list[Spec] = [((1, 2, 1, 8), torch.bfloat16), ((2, 1, 1, 3), torch.float32)]


def _race(rounds: int) -> tuple[list[str], list[int]]:
    """Many exchanges in a row while every rank sleeps at other times, also between a push and what it takes out."""
    push, room = interpreted(), _room(4096)
    sleep = delays(room.place, 0.02)
    kernels = push._push, push._take
    push._push, push._take = (_Slow(kernel, sleep) for kernel in kernels)
    try:
        wrong = [
            text for seed in range(rounds) for text in _exchange(room, RACING[: 1 + seed % 2], MODES[seed % 2], seed)
        ]
    finally:
        push._push, push._take = kernels
    return wrong, room.words[::16].tolist()


@pytest.mark.parametrize("rounds", [16, pytest.param(200, marks=pytest.mark.slow)])
def test_races(ranks: Ranks, rounds: int) -> None:
    for wrong, words in ranks.run(_race, rounds):
        assert not wrong
        # EPOCH and every flag have counted the exchanges; TICKET, WAITING and ABORT are as they were.
        assert words == [rounds, 0, 0, 0, *[rounds] * ranks.world_size]


def _one_stays_away() -> None:
    room = _room(4096)
    if room.place != 0:
        _exchange(room, RACING, (2, 1), 0)


@pytest.mark.slow
def test_a_rank_that_stays_away_is_waited_for() -> None:
    """What `test_races` relies on: nobody goes on without the others, and the harness ends it."""
    with pytest.raises(RankFailure, match="was not done after 6 s"):
        Ranks.get(2).run(_one_stays_away, deadline_s=6)


# What the host sees and can do -------------------------------------------------------------------------------------


def _give_up() -> list[Any]:
    """Place 0 comes late. The others' hosts see whom they wait for, and end the wait."""
    import fvops
    from fvops.kernels import push_plan

    room, group = _room(4096), fvops.get_sp_group()
    wrong, seen = _exchange(room, RACING, (2, 1), 0), []

    def watch() -> None:
        words = room.words
        while words[push_plan.WAITING] == 0:
            pass
        target, P = int(words[push_plan.WAITING]), room.world_size
        seen.append([p for p in range(P) if words[push_plan.FLAGS + push_plan.LINE_WORDS * p] < target])
        words[push_plan.ABORT] = 1

    if room.place:
        # Not before the other latecomers have posted, so that only place 0 is missing.
        thread = threading.Thread(target=lambda: (_wait_for_flags(room), watch()))
        thread.start()
        void = _void(room)
        thread.join()
        again = _void(room)
    else:
        void = again = True
    group.barrier()
    return [wrong, seen, void, again]


def _wait_for_flags(room: Any) -> None:
    from fvops.kernels import push_plan

    for place in range(1, room.world_size):
        while room.words[push_plan.FLAGS + push_plan.LINE_WORDS * place] < 2:
            pass


def _void(room: Any) -> bool:
    """Is what an exchange gives all ones, and so NaN?"""
    from fvops.kernels import layout, push

    P = room.world_size
    x, y = torch.ones(1, 2, 2 * P, 3), torch.zeros(1, 2 * P, 2, 3)
    push.exchange(room, [layout.sequence_by_rank(y, P)], [layout.heads_by_rank(x, P)])
    return bool(y.isnan().all()) and bool((bits(y) == 255).all())


def test_a_wait_can_be_given_up_and_its_result_is_void() -> None:
    for place, (wrong, seen, void, again) in enumerate(Ranks.get(3).run(_give_up)):
        assert not wrong
        assert seen == ([[0]] if place else [])
        assert void
        assert again  # for good


# Far addresses and refusals ----------------------------------------------------------------------------------------


def _far() -> list[str]:
    """Slots of over 2**31 bytes, moved byte by byte: mostly holes. The second exchange is beyond 2**31 words."""
    room = _room((1 << 31) + 128)
    specs: list[Spec] = [((1, 3, 1, 3), torch.uint8)]
    return [text for seed in range(2) for text in _exchange(room, specs, (2, 1), seed)]


def test_offsets_beyond_32_bits(two_ranks: Ranks) -> None:
    assert two_ranks.run(_far) == [[], []]


def _refusals() -> list[str]:
    push, room, told = interpreted(), _room(256), list[str]()
    P = room.world_size
    for outputs, inputs in (
        ([torch.zeros(P, 100)], [torch.zeros(P, 100)]),
        ([torch.zeros(P, 8)[:, ::2]], [torch.zeros(P, 4)]),
        ([torch.zeros(P, 4)], [torch.zeros(P, 5)]),
    ):
        try:
            push.exchange(room, outputs, inputs)
        except ValueError as error:
            told.append(str(error))
    return told


def test_refusals(two_ranks: Ranks) -> None:
    for large, gaps, shapes in two_ranks.run(_refusals):
        assert "results of 896 bytes do not fit into a slot of 256 bytes" in large
        assert "a result has gaps: shape (2, 4), strides (8, 2)" in gaps
        assert "the source is (2, 5), the destination (2, 4)" in shapes
