"""StatelessProcessGroup: objects over a store, where it listens, groups that overlap, failures."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fvops.utils import StatelessProcessGroup
from tests.harness import Ranks
from tests.waiting import wait_until


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _rank() -> tuple[int, int]:
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _everything(port: int) -> list[Any]:
    from fvops.parallel_state import get_same_node_ranks, is_the_same_node_as

    me, P = _rank()
    group = StatelessProcessGroup.create("127.0.0.1", port, me, P)
    told: list[Any] = [group.all_gather_obj({"rank": me, "x": torch.full((2,), me)})[P - 1]["x"].tolist()]
    told.append([group.broadcast_obj(("from", src) if me == src else None, src) for src in range(P)])
    # Every rank sends to every other first; several senders to one receiver do not collide.
    for turn in range(2):
        for dst in range(P):
            if dst != me:
                group.send_obj([me, dst, turn], dst)
    others = [src for src in range(P) if src != me]
    told.append([[group.recv_obj(src) for src in reversed(others)] for _ in range(2)])
    large = bytes([me]) * (9 << 20)  # more than torch's store takes as one value
    told.append(group.broadcast_obj(large if me == 0 else None, 0) == bytes(9 << 20))
    told.append(is_the_same_node_as(group, P - 1) == [True] * P and get_same_node_ranks(group) == list(range(P)))
    told.append(not dist.is_initialized())
    group.barrier()
    group.expire_data()
    left = [key for key, _ in group.entries]
    group.barrier()
    return [*told, left]


def test_objects_go_every_way(ranks: Ranks) -> None:
    P = ranks.world_size
    for me, told in enumerate(ranks.run(_everything, _free_port(), initialize=False, deadline_s=100)):
        others = [src for src in reversed(range(P)) if src != me]
        wanted = [[[src, me, turn] for src in others] for turn in range(2)]
        assert told == [[P - 1] * 2, [("from", src) for src in range(P)], wanted, True, True, True, []]


def test_the_store_listens_on_the_given_address_only() -> None:
    port = _free_port()
    group = StatelessProcessGroup.create("127.0.0.1", port, 0, 1)
    addresses = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    with socket.create_connection(("127.0.0.1", port), 5):
        pass
    for address in {"127.0.0.2", *addresses} - {"127.0.0.1"}:
        with pytest.raises(OSError):
            socket.create_connection((address, port), 2).close()
    assert group.all_gather_obj(3) == [3]
    group.barrier()


def _two(store: Any, names: list[str]) -> list[tuple[StatelessProcessGroup, StatelessProcessGroup]]:
    """For each name, both ends of a group of two, in this process."""
    return [tuple(StatelessProcessGroup.over_store(store, name, rank, 2) for rank in range(2)) for name in names]  # type: ignore[misc]


def test_groups_over_one_store_do_not_meet() -> None:
    store = dist.HashStore()
    (a0, a1), (b0, b1) = _two(store, ["a", "b"])
    a0.send_obj("of a", 1)
    b0.send_obj("of b", 1)
    a0.broadcast_obj("all of a", 0)
    # A later group of the same name does not see what an earlier one left behind.
    ((c0, c1),) = _two(store, ["a"])
    c0.send_obj("of c", 1)
    assert (b1.recv_obj(0), c1.recv_obj(0), a1.recv_obj(0)) == ("of b", "of c", "of a")
    assert a1.broadcast_obj(None, 0) == "all of a"


_COLLECTIVES: dict[str, tuple[Callable[[StatelessProcessGroup], Any], str]] = {
    "broadcast_obj": (lambda group: group.broadcast_obj(None, 0), "for an object of rank 0"),
    "all_gather_obj": (lambda group: group.all_gather_obj("of rank 1"), "for an object of rank 0"),
    "barrier": (lambda group: group.barrier(), r"at barrier 0; missing: ranks \[0\]"),
}


@pytest.mark.parametrize("op", _COLLECTIVES)
def test_after_a_collective_has_failed_every_call_says_so(op: str) -> None:
    store = dist.HashStore()
    one, other = (StatelessProcessGroup.over_store(store, "a", rank, 2, timeout_s=0.3) for rank in range(2))
    # What nobody sent in time may be asked for again.
    with pytest.raises(RuntimeError, match=r"StatelessProcessGroup\.recv_obj on group 'a', rank 1 of 2: waited 0\.3 s"):
        other.recv_obj(0)
    one.send_obj("late", 1)
    assert other.recv_obj(0) == "late"

    call, text = _COLLECTIVES[op]
    with pytest.raises(RuntimeError, match=rf"{op} on group 'a', rank 1 of 2: waited 0\.3 s {text}") as first:
        call(other)
    # Rank 0 comes to its first call now. Were rank 1's next answered with what belongs to that, nobody would notice.
    one.broadcast_obj("first", 0)
    one.send_obj("first", 1)
    for name, later in {
        **{name: call for name, (call, _) in _COLLECTIVES.items()},
        "recv_obj": lambda group: group.recv_obj(0),
        "send_obj": lambda group: group.send_obj(1, 0),
    }.items():
        with pytest.raises(RuntimeError, match=rf"\.{name} on group 'a', rank 1 of 2: this group is broken") as caught:
            later(other)
        assert str(first.value) in str(caught.value)


def _late_to_the_first(folder: str) -> list[Any]:
    """Rank 0 comes to its first all_gather once rank 1 has given up on it and tried again."""
    me, P = _rank()
    store = dist.FileStore(os.path.join(folder, "store"), P)
    group = StatelessProcessGroup.over_store(store, "late", me, P, timeout_s=1.0)
    if me == 0:
        store.wait(["given up"], timedelta(seconds=60))
        group.all_gather_obj("call 1 of rank 0")
        store.set("came", "")
        return []
    texts = []
    for n in (1, 2):
        try:
            texts.append(group.all_gather_obj(f"call {n} of rank 1"))
        except RuntimeError as error:
            texts.append(str(error))
        if n == 1:
            store.set("given up", "")
            store.wait(["came"], timedelta(seconds=60))
    return texts


def test_a_retry_does_not_get_what_belongs_to_the_call_before(two_ranks: Ranks, tmp_path: Path) -> None:
    _, (first, second) = two_ranks.run(_late_to_the_first, str(tmp_path), initialize=False, deadline_s=90)
    assert "all_gather_obj on group 'late', rank 1 of 2: waited 1 s for an object of rank 0" in first
    assert "this group is broken since an earlier error" in second
    assert first in second


class _Gone:
    """A store whose server has gone, after the groups over it were made."""

    def __init__(self) -> None:
        self.gone = False

    def __getattr__(self, name: str) -> Any:
        def ask(*args: Any) -> Any:
            if self.gone:
                raise dist.DistNetworkError("Connection reset by peer")
            return 1

        return ask


def test_a_store_that_does_not_answer_is_told_with_op_group_and_rank() -> None:
    for op, call in {
        "send_obj": lambda group: group.send_obj(1, 0),
        "recv_obj": lambda group: group.recv_obj(0),
        **{name: call for name, (call, _) in _COLLECTIVES.items()},
        "expire_data": lambda group: group.expire_data(),
    }.items():
        store = _Gone()
        group = StatelessProcessGroup(1, 2, store, name="lost")
        group.entries.append(("a key", time.monotonic()))
        store.gone = True
        with pytest.raises(
            RuntimeError, match=rf"\.{op} on group 'lost', rank 1 of 2: the store does not answer.*Connection reset"
        ):
            call(group)
        with pytest.raises(RuntimeError, match=rf"send_obj on group 'lost'.*this group is broken.*\.{op} on group"):
            group.send_obj(1, 0)
    with pytest.raises(RuntimeError, match=r"joining on group 'lost', rank 1 of 2: the store does not answer"):
        StatelessProcessGroup(1, 2, store, name="lost")


def test_a_group_has_a_deadline_of_its_own() -> None:
    one, other = (StatelessProcessGroup.over_store(dist.HashStore(), "a", rank, 2, timeout_s=0.2) for rank in range(2))
    for call in (lambda: other.recv_obj(0), lambda: other.broadcast_obj(None, 0), one.barrier):
        with pytest.raises(RuntimeError, match=r"waited 0\.2 s"):
            call()
    with pytest.raises(RuntimeError, match=r"rank 1 cannot reach the store of rank 0"):
        StatelessProcessGroup.create("127.0.0.1", _free_port(), 1, 2, timeout_s=0.5)
    with pytest.raises(ValueError, match="timeout_s=0 must be"):
        StatelessProcessGroup(0, 1, dist.HashStore(), timeout_s=0)


def test_the_barrier_waits_and_leaves_nothing() -> None:
    store = dist.HashStore()
    ((one, other),) = _two(store, ["a"])
    keys = store.num_keys()
    order = []
    thread = threading.Thread(target=lambda: (other.barrier(), order.append("other")))
    thread.start()
    order.append("one comes")
    one.barrier()
    thread.join(30)
    assert order[0] == "one comes"
    assert order[1:] == ["other"]
    assert store.num_keys() == keys


class _Unknown:
    pass


def test_a_failing_sender_tells_the_receivers() -> None:
    ((one, other),) = _two(dist.HashStore(), ["a"])
    for send, receive in (
        (lambda obj: one.send_obj(obj, 1), lambda: other.recv_obj(0)),
        (lambda obj: one.broadcast_obj(obj, 0), lambda: other.broadcast_obj(None, 0)),
    ):
        with pytest.raises(TypeError, match="add_safe_globals"):
            send(_Unknown())
        with pytest.raises(TypeError, match=r"rank 0 could not send.*add_safe_globals"):
            receive()
        send("next")
        assert receive() == "next"


def test_data_expires_and_what_was_read_is_forgotten() -> None:
    store = dist.HashStore()
    one = StatelessProcessGroup.over_store(store, "a", 0, 2, data_expiration_seconds=0.05)
    before = store.num_keys()
    one.send_obj("nobody reads this", 1)
    assert store.num_keys() == before + 1

    def expired() -> bool:
        one.expire_data()
        return (store.num_keys(), len(one.entries)) == (before, 0)

    wait_until(expired)


def test_refusals() -> None:
    ((one, _),) = _two(dist.HashStore(), ["a"])
    for call in (
        lambda: one.send_obj(1, 0),
        lambda: one.recv_obj(2),
        lambda: one.broadcast_obj(1, -1),
        lambda: StatelessProcessGroup.create("127.0.0.1", 0, 0, 1),
        lambda: StatelessProcessGroup.create("127.0.0.1", 2, 3, 2),
        lambda: StatelessProcessGroup(2, 2, dist.HashStore()),
    ):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(RuntimeError, match="must be an address of its machine"):
        StatelessProcessGroup.create("192.0.2.77", 4321, 0, 1)


def _server_gone(port: int) -> str:
    me, P = _rank()
    group = StatelessProcessGroup.create("127.0.0.1", port, me, P)
    group.barrier()
    if me == 0:
        return "left first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FVOPS_TIMEOUT_S", "10")
        with pytest.raises(RuntimeError) as caught:
            group.recv_obj(0)
        return str(caught.value)


def test_a_server_that_is_gone_is_an_error_at_the_others(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(_server_gone, _free_port(), initialize=False)
    assert first == "left first"
    assert "store" in second or "object of rank 0" in second
