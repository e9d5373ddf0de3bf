"""A store, a ring and a queue at work, and bytes in them that an enemy has changed: an error, or an object, in time.

Beside `test_hostile_bytes.py`, whose frames go to the decoders themselves. Each case may return an object (a changed
number is still a number) or raise; it may not crash, wait past its deadline, run code or take memory.
"""

from __future__ import annotations

import contextlib
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from fvops.serialization import decode, encode
from fvops.utils import StatelessProcessGroup
from tests.harness import Ranks
from tests.remains import resident_within
from tests.test_hostile_bytes import _MOST_RESIDENT, _frame, _mutated, _pickles, _ring
from tests.test_message_queue import _queue

_MOST_BYTES = 5 << 20
_REFUSED = (TypeError, ValueError)


def _within_bounds(case: Callable[[], None], number: int) -> None:
    """Run `case`; AssertionError if it took more than 5 MiB, whatever the bytes announce."""
    tracemalloc.start()
    try:
        case()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < _MOST_BYTES, f"case {number} took {peak} bytes"


def _some_frame(draw: random.Random, frames: list[bytearray]) -> bytearray:
    return frames[draw.randrange(len(frames))] if draw.randrange(2) else frames[0]


def _frames(folder: Path) -> list[bytearray]:
    """The recorded frame first, then pickles that would leave a folder in `folder`."""
    return [_frame(), *map(bytearray, _pickles(folder))]


def _fuzz_store(folder: Path, cases: int, seed: int) -> int:
    """How many changed messages a group over a live store still took for objects."""
    draw, frames = random.Random(seed), _frames(folder)
    # Port 0: the store's own choice. A message that ends early is waited for, so the deadline is short.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = StatelessProcessGroup.over_store(store, "fuzz", 1, 2)
    scoped = dist.PrefixStore("fvops/stateless/fuzz", store)
    taken = 0

    def read() -> None:
        nonlocal taken
        with contextlib.suppress(*_REFUSED, RuntimeError):
            group.recv_obj(0)
            taken += 1

    for number in range(cases):
        data = b"\0" + bytes(_some_frame(draw, frames))
        message = _mutated(bytearray(len(data).to_bytes(8, "little") + data), draw)
        scoped.set(f"fvops/2/1/sent/0-1/{group.recv_src_counter[0]}/0", bytes(message))
        _within_bounds(read, number)
    scoped.set(f"fvops/2/1/sent/0-1/{group.recv_src_counter[0]}/0", (6).to_bytes(8, "little") + b"\0" + encode(None))
    assert group.recv_obj(0) is None
    return taken


def _fuzz_ring(folder: Path, cases: int, seed: int) -> int:
    """How many changed chunks of a ring still made an object."""
    draw, frames = random.Random(seed), _frames(folder)
    made = 0
    for number in range(cases):
        ring, writer, reader = _ring(folder)
        # The ring's chunks are 64 bytes, and it has four.
        writer.write(bytes(_some_frame(draw, frames)[: draw.randrange(1, 200)]), time.monotonic() + 5)
        for _ in range(draw.randint(1, 6)):
            slot = ring.slot(draw.randrange(4))
            at = draw.randrange(min(len(slot), 24 if draw.randrange(2) else len(slot)))
            slot[at] = draw.randrange(256)

        def read(reader: Any = reader) -> None:
            nonlocal made
            with contextlib.suppress(*_REFUSED, TimeoutError):
                decode(reader.read(time.monotonic() + 0.005))
                made += 1

        _within_bounds(read, number)
    return made


def _fuzz_queue(folder: str, cases: int, seed: int) -> int:
    """Place 0 writes changed frames into a live queue; how many the reader refused. An honest object follows."""
    import fvops
    from fvops import objects
    from fvops.objects import Message

    draw, frames, queue, refused = random.Random(seed), _frames(Path(folder)), _queue(), 0

    def read() -> None:
        nonlocal refused
        try:
            queue.dequeue()
        except _REFUSED:
            refused += 1

    with resident_within(_MOST_RESIDENT):
        for number in range(cases):
            frame = _mutated(_some_frame(draw, frames), draw)
            if fvops.get_sp_group().rank_in_group == 0:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(objects, "pack", lambda *_, frame=frame: Message(frame))
                    queue.enqueue(1)
            else:
                _within_bounds(read, number)
    if fvops.get_sp_group().rank_in_group == 0:
        queue.enqueue({"honest": 1})
    else:
        assert queue.dequeue() == {"honest": 1}
    return refused


_CASES = [200, pytest.param(10_000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("cases", _CASES)
def test_a_live_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cases: int) -> None:
    monkeypatch.setenv("FVOPS_TIMEOUT_S", "0.02")
    with resident_within(_MOST_RESIDENT):
        assert _fuzz_store(tmp_path, cases, seed=cases) < cases
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cases", _CASES)
def test_a_live_ring(tmp_path: Path, cases: int) -> None:
    with resident_within(_MOST_RESIDENT):
        assert _fuzz_ring(tmp_path, cases, seed=cases) < cases
    assert [path.name for path in tmp_path.iterdir()] == ["ring"]


@pytest.mark.parametrize("cases", _CASES)
def test_a_live_queue(two_ranks: Ranks, tmp_path: Path, cases: int) -> None:
    refused = two_ranks.run(_fuzz_queue, str(tmp_path), cases, cases, deadline_s=60 + cases / 20)[1]
    assert cases / 3 < refused <= cases
    assert list(tmp_path.iterdir()) == []
