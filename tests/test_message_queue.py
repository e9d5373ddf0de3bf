"""MessageQueue: order, large objects, back-pressure, readers elsewhere, death on either side, nothing left behind."""

from __future__ import annotations

import gc
import os
import signal
import time
from typing import Any

import pytest
import torch

from tests.harness import RankFailure, Ranks
from tests.remains import held
from tests.worlds import initialized


def _queue(chunk_bytes: int = 256, chunks: int = 4, writer: int = 0, far: tuple[int, ...] = ()) -> Any:
    """A queue over all ranks; the places `far` see another folder, as if on another node."""
    import fvops
    from fvops.device_communicators import shm_broadcast

    group = fvops.get_sp_group()
    real = shm_broadcast.SHARED_FOLDER
    if group.rank_in_group in far:
        shm_broadcast.SHARED_FOLDER = "/nowhere"
    try:
        return shm_broadcast.MessageQueue.create_from_process_group(group.cpu_group, chunk_bytes, chunks, writer)
    finally:
        shm_broadcast.SHARED_FOLDER = real


def _many(writer: int, far: tuple[int, ...]) -> list[Any]:
    """More and larger objects than the ring holds; then the ring is full, and stays usable."""
    import fvops

    gc.collect()
    mapped = held()["mapped segments"]
    queue = _queue(writer=writer, far=far)
    group = fvops.get_sp_group()
    sent = [{"n": n, "x": torch.arange(n * 7), "pad": bytes(n * 100)} for n in range(30)]
    if queue.is_writer:
        for obj in sent:
            queue.enqueue(obj)
        told: list[Any] = [True]
    else:
        got = [queue.dequeue() for _ in sent]
        told = [all(torch.equal(a["x"], b["x"]) and a["pad"] == b["pad"] for a, b in zip(got, sent, strict=True))]
        with pytest.raises(TimeoutError):
            queue.dequeue(timeout=0.05)
        with pytest.raises(RuntimeError, match="cannot enqueue"):
            queue.enqueue(1)
    group.barrier()
    if queue.is_writer:
        for n in range(4):
            queue.enqueue(n, timeout=5)
        with pytest.raises(TimeoutError, match=r"after 0\.05 s"):
            queue.enqueue("too many", timeout=0.05)
    group.barrier()
    told.append([n if queue.is_writer else queue.dequeue() for n in range(4)] == [0, 1, 2, 3])
    told.append(queue.broadcast_object("last" if queue.is_writer else None) == "last")
    group.barrier()
    near = [place for place in range(group.world_size) if place not in (writer, *far)]
    has_ring = bool(near) if queue.is_writer else group.rank_in_group in near
    told.append(held()["mapped segments"] - mapped == has_ring)
    queue.close()
    with pytest.raises(RuntimeError, match="closed"):
        queue.broadcast_object(1)
    return told


def test_objects_arrive_in_order(ranks: Ranks) -> None:
    P = ranks.world_size
    for writer, far in ((0, ()), (P - 1, (0,)), (0, tuple(range(1, P)))):
        assert ranks.run(_many, writer, far, deadline_s=60) == [[True] * 4] * P


class _Unknown:
    pass


def _failures() -> list[str]:
    queue = _queue()
    texts = []
    try:
        queue.broadcast_object(_Unknown() if queue.is_writer else None)
    except TypeError as error:
        texts.append(str(error))
    return [*texts, queue.broadcast_object("fine")]


def test_a_failing_writer_tells_the_readers(two_ranks: Ranks) -> None:
    for text, after in two_ranks.run(_failures):
        assert "_Unknown" in text
        assert "add_safe_globals" in text
        assert after == "fine"


def _different() -> str:
    import fvops

    with pytest.raises(ValueError) as caught:
        _queue(chunk_bytes=64 + fvops.get_sp_group().rank_in_group)
    with pytest.raises(ValueError, match="max_chunks=0"):
        _queue(chunks=0)
    return str(caught.value)


def test_ranks_that_disagree_are_told(two_ranks: Ranks) -> None:
    for text in two_ranks.run(_different):
        assert "(64, 4, 0), (65, 4, 0)" in text


def _over_the_store(leaver: int) -> list[str]:
    """Places 1 and 2 read over the store; 1 reads nothing for a while, then `leaver` closes its end."""
    import fvops

    group = fvops.get_sp_group()
    queue = _queue(chunks=2, far=(1, 2))
    me = group.rank_in_group
    texts = []
    if me == 1:
        with pytest.raises(TimeoutError) as caught:
            queue.dequeue(timeout=0.3)
        texts.append(str(caught.value))
    group.barrier()
    if me == 0:
        queue.enqueue(0)
        queue.enqueue(1)
    elif me == 2:
        assert [queue.dequeue(), queue.dequeue()] == [0, 1]
    group.barrier()
    if me == 0:
        with pytest.raises(TimeoutError) as caught:
            queue.enqueue("no room", timeout=0.3)
        texts.append(str(caught.value))
    group.barrier()
    if leaver == 1:
        # A reader that owes nothing more does not hold up the others; one that leaves does, and is named at once.
        if me == 1:
            assert queue.dequeue() == 0
        group.barrier()
        if me == 0:
            queue.enqueue(2, timeout=30)
        group.barrier()
        if me == 1:
            time.sleep(0.5)  # so that the writer waits when this closes
            queue.close()
    elif me == leaver:
        time.sleep(0.5)  # so that place 2 waits when this closes
        queue.close()
    began = time.monotonic()
    if me == 0 and leaver == 1:
        with pytest.raises(RuntimeError) as told:
            queue.enqueue("no reader", timeout=60)
        texts.append(str(told.value))
    elif me == 2 and leaver == 0:
        # It waits, and is woken.
        with pytest.raises(RuntimeError) as told:
            queue.dequeue(timeout=60)
        texts.append(str(told.value))
    elif me == 1 and leaver == 0:
        # What was written before still counts.
        assert [queue.dequeue(), queue.dequeue()] == [0, 1]
        with pytest.raises(RuntimeError) as told:
            queue.dequeue(timeout=60)
        texts.append(str(told.value))
    assert time.monotonic() - began < 30
    group.barrier()
    queue.close()
    return texts


@pytest.mark.parametrize("leaver", [pytest.param(0, id="writer"), pytest.param(1, id="reader")])
def test_over_a_store_who_is_late_is_named_and_who_leaves_tells(leaver: int) -> None:
    writer, first, second = Ranks.get(3).run(_over_the_store, leaver, deadline_s=100)
    late = "MessageQueue.dequeue on place 1 after 0.3 s: place 0, the writer, has not written message 0"
    assert first[0].startswith(late)
    full = "MessageQueue.enqueue on place 0 after 0.3 s: places [1], which read over the store, have not read message 0"
    assert writer[0] == full
    if leaver == 1:
        left = "MessageQueue.enqueue on place 0: places [1], which read over the store, have left the queue"
        assert writer[1] == left
    else:
        for place, text in ((1, first[1]), (2, second[0])):
            assert text == f"MessageQueue.dequeue on place {place}: place 0, the writer, has left the queue"


def _cpu_of_a_wait() -> list[float]:
    import fvops

    queue = _queue()
    group = fvops.get_sp_group()
    group.barrier()
    if queue.is_writer:
        time.sleep(1.0)  # the wait whose cost is measured
        queue.enqueue("at last")
        return [0.0, 1.0]
    began, cpu = time.monotonic(), time.thread_time()
    queue.dequeue()
    return [time.thread_time() - cpu, time.monotonic() - began]


def test_a_waiting_reader_sleeps(two_ranks: Ranks) -> None:
    (_, (cpu, waited)) = two_ranks.run(_cpu_of_a_wait)
    assert cpu < 0.2 * waited


def _death(victim: int) -> str:
    """The victim is killed; the other finds it out long before the deadline of 60 s."""
    import fvops

    queue = _queue()
    me = fvops.get_sp_group().rank_in_group
    queue.broadcast_object(1)
    if me == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    if queue.is_writer:
        # The reader took the first at most: the next four fill the ring.
        for _ in range(4):
            queue.enqueue(1)
    with pytest.raises(RuntimeError) as caught:
        queue.broadcast_object(1 if queue.is_writer else None)
    raise ValueError(f"told: {caught.value}")


# Quick is the same in a group, which tests/fault_table.py has.
@pytest.mark.slow
@pytest.mark.parametrize("victim", [pytest.param(0, id="writer"), pytest.param(1, id="reader")])
def test_death_is_found_out(victim: int) -> None:
    with pytest.raises(RankFailure) as caught:
        Ranks.get(2).run(_death, victim, deadline_s=60)
    assert f"told: MessageQueue.{'enqueue' if victim else 'dequeue'} on place {1 - victim}" in str(caught.value)
    assert "has died" in str(caught.value)


def _of_a_group() -> list[Any]:
    import fvops

    with initialized(2, 1):
        group = fvops.get_tp_group()
        me = group.rank_in_group
        told: list[Any] = [group.mq_broadcaster is not None, fvops.get_sp_group().mq_broadcaster is None]
        told.append(group.broadcast_object({"x": torch.ones(2)} if me == 0 else None)["x"].tolist() == [1.0, 1.0])
        items = [1, bytes(1 << 20)] if me == 0 else ["old"]
        told.append(group.broadcast_object_list(items) is items and len(items[1]) == 1 << 20)
        with pytest.raises(ValueError, match="src must be 0"):
            group.broadcast_object(1, src=1)
        told.append(group.broadcast_object_list([me], 1, group=group.cpu_group) == [1])
    return [*told, group.mq_broadcaster is None]


def test_tensor_parallel_groups_have_one(two_ranks: Ranks) -> None:
    assert two_ranks.run(_of_a_group, initialize=False) == [[True] * 6] * 2
