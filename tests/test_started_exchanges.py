"""Exchanges that are started and waited for later, without a compiler: results, order, failures, what is left over."""

from __future__ import annotations

import signal
import threading
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import harness
from tests.harness import Ranks
from tests.worlds import tear_down

TRANSPORTS = ["shm", "process_group", "nccl", "hccl"]
OPS = torch.ops.fvops


def _of(group: Any, *inputs: Tensor, form: str = "single") -> tuple[Any, ...]:
    return [*inputs], 2, 1, form, group.world_size, group.unique_name


def _input(place: int, P: int, large: bool = False) -> Tensor:
    shape = (1, 64, 8 * P, 64) if large else (2, 3, 2 * P, 5)
    return torch.rand(shape, generator=torch.Generator().manual_seed(place))


def _many() -> tuple[list[bool], int]:
    """Many under way at once, small and large, waited for in another order, eager calls between."""
    import fvops

    group = fvops.get_sp_group()
    P, place = group.world_size, group.rank_in_group
    right = []
    for large in (False, True):
        inputs = [_input(place + 10 * number, P, large) for number in range(4)]
        packed = inputs[3].unflatten(2, (P, -1)).permute(2, 0, 1, 3, 4).contiguous()
        calls = [
            _of(group, inputs[0]),
            _of(group, *inputs[1:3], form="coalesced"),
            _of(group, packed, form="packed single"),
        ]
        tickets = [OPS.all_to_all_4D_start(*call) for call in calls]
        total = group.all_reduce(torch.ones(3))
        received = [OPS.all_to_all_4D_wait(tickets[i], *calls[i]) for i in (2, 0, 1)]
        want = [group.all_to_all_4D(x, 2, 1) for x in inputs]
        unpacked = received[0][0].permute(1, 0, 2, 3, 4).flatten(1, 2)
        got = [*received[1], *received[2], unpacked]
        right += [bool((g == w).all()) for g, w in zip(got, want, strict=True)] + [bool((total == P).all())]
    fvops.cleanup_dist_env_and_memory()
    return right, _threads()


def _threads() -> int:
    return sum(thread.name.startswith("fvops exchanges") for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("world_size", "transport"),
    [
        pytest.param(P, transport, marks=() if (P, transport) == (3, "shm") else pytest.mark.slow)
        for P in (2, 3, 4)
        for transport in TRANSPORTS
    ],
)
def test_many_under_way(world_size: int, transport: str) -> None:
    for right, threads in Ranks.get(world_size, transport).run(_many, deadline_s=100):
        assert right == [True] * 10
        assert threads == 0  # ended with its group


def _error(call: Any) -> str:
    try:
        call()
    except (RuntimeError, ValueError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return "NOT REFUSED"


def _group(timeout_s: float) -> Any:
    import fvops
    from fvops.parallel_state import init_model_parallel_group

    harness.init_fvops(suffix="started")
    return init_model_parallel_group(
        [list(range(fvops.get_world_size()))], 0, "gloo", group_name="brief", timeout_s=timeout_s
    )


def _meet(name: str) -> None:
    import torch.distributed as dist

    store = dist.distributed_c10d._get_default_store()
    store.set(f"{name}/{dist.get_rank()}", "")
    store.wait([f"{name}/{rank}" for rank in range(dist.get_world_size())], timedelta(seconds=60))


def _nobody_comes() -> list[str]:
    """Rank 1 starts nothing: rank 0 is told so where it waits, and at whatever is behind."""
    group = _group(1.5)
    call = _of(group, _input(0, group.world_size))
    texts = []
    if group.rank_in_group == 0:
        first, second = OPS.all_to_all_4D_start(*call), OPS.all_to_all_4D_start(*call)
        texts = [
            _error(lambda: OPS.all_to_all_4D_wait(first, *call)),
            _error(lambda: OPS.all_to_all_4D_wait(second, *call)),
            _error(lambda: OPS.all_to_all_4D_start(*call)),
            _error(lambda: OPS.all_to_all_4D_wait(first, *call)),
        ]
    _meet("told")
    tear_down()
    return [*texts, str(_threads())]


@pytest.mark.parametrize("transport", ["shm", pytest.param("process_group", marks=pytest.mark.slow)])
def test_a_peer_that_does_not_come(transport: str) -> None:
    told, alone = Ranks.get(2, transport).run(_nobody_comes, initialize=False, deadline_s=100)
    failed, behind, later, twice, threads = told
    assert failed.startswith(
        "RuntimeError: fvops.all_to_all_4D on group 'brief:0' of (2, 3, 4, 5) torch.float32, call 1,"
    )
    assert "deadline 1.5 s" in failed
    for text in (behind, later):
        assert "this group is broken since an earlier error" in text, text
        assert "call 1, failed" in text, text
    assert "the ticket is of no exchange under way" in twice
    assert threads == "0"
    assert alone == ["0"]


def _interrupted() -> list[Any]:
    """Rank 0 is interrupted in its wait: what is behind is refused, and rank 1, which comes late, is not kept."""
    group = _group(20.0)
    # Large: of a small one the peer would have rank 0's part already.
    call = _of(group, _input(0, group.world_size, large=True))
    began = time.monotonic()
    texts = []
    if group.rank_in_group == 0:
        ticket = OPS.all_to_all_4D_start(*call)

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt("enough")

        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        texts = [_error(lambda: OPS.all_to_all_4D_wait(ticket, *call)), _error(lambda: group.all_reduce(torch.ones(2)))]
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        group.destroy()  # until then the thread might still meet a peer that comes
        _meet("interrupted")
    else:
        _meet("interrupted")
        texts = [_error(lambda: OPS.all_to_all_4D_wait(OPS.all_to_all_4D_start(*call), *call))]
    _meet("told")
    tear_down()
    return [time.monotonic() - began < 15, _threads(), *texts]


def test_an_interrupt_in_a_wait() -> None:
    first, second = Ranks.get(2, "shm").run(_interrupted, initialize=False, deadline_s=100)
    assert first[:3] == [True, 0, "KeyboardInterrupt: enough"]
    assert "this group is broken since an earlier error" in first[3]
    assert "KeyboardInterrupt" in first[3]
    assert second[:2] == [True, 0]
    assert "gave up with an error of its own" in second[2]


def _destroyed() -> list[Any]:
    """Rank 0 destroys the group with an exchange under way that rank 1 never comes to."""
    import fvops

    group = _group(1.5)
    call = _of(group, _input(0, group.world_size))
    text = ""
    if group.rank_in_group == 0:
        ticket = OPS.all_to_all_4D_start(*call)
        group.destroy()
        text = _error(lambda: OPS.all_to_all_4D_wait(ticket, *call))
    _meet("destroyed")
    left = _threads()
    total = fvops.get_sp_group().all_reduce(torch.ones(1)).item()
    tear_down()
    return [left, total, text]


def test_destroyed_with_an_exchange_under_way() -> None:
    first, second = Ranks.get(2, "shm").run(_destroyed, initialize=False, deadline_s=100)
    assert first[:2] == second[:2] == [0, 2.0]
    assert first[2].startswith("RuntimeError: fvops.all_to_all_4D on group 'brief:0'")


def _refusals() -> list[str]:
    import fvops

    group = fvops.get_sp_group()
    x = _input(0, group.world_size)
    return [
        _error(lambda: OPS.all_to_all_4D_start(*_of(group, x, form="double"))),
        _error(lambda: OPS.all_to_all_4D_start(*_of(group, x[0]))),
        _error(lambda: OPS.all_to_all_4D_wait(x, *_of(group, x))),
    ]


def test_refused_before_anything_is_sent(two_ranks: Ranks) -> None:
    form, shape, ticket = two_ranks.run(_refusals)[0]
    assert "form='double' must be one of 'single', 'coalesced', 'packed single', 'packed coalesced'" in form
    assert shape.startswith("ValueError: fvops.all_to_all_4D on group 'sp:0'")
    assert "the ticket is of no exchange under way" in ticket


class _Stream:
    """A stream, or an event on one, that notes in `log` what is asked of it."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_event(self, event: _Stream) -> None:
        self.log.append(f"{self.name} waits for {event.name}")


class _Streams:
    """As `library_streams.Streams`, on a device that there is none of."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = self.main = _Stream(self.log, "main")
        self._events = 0

    def side(self) -> _Stream:
        return _Stream(self.log, "side")

    def resolve(self, op: str, group_name: str, stream: Any) -> _Stream:
        return self.current

    def mark(self, stream: _Stream) -> _Stream:
        self._events += 1
        self.log.append(f"{stream.name} marks {self._events}")
        return _Stream(self.log, str(self._events))

    def use(self, stream: _Stream) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def used() -> Any:
            before, self.current = self.current, stream
            yield
            self.current = before

        return used()


def test_a_side_stream_joins_and_is_joined() -> None:
    """The events between the current stream and the other one; both are in a capture, for each follows the other."""
    from fvops.device_communicators.asynchronous import SideStream

    streams = _Streams()

    def issue(op: str, *_: Any) -> None:
        later.settle()
        streams.log.append(f"{op} on {streams.current.name}")

    later: Any = SideStream(SimpleNamespace(_issue=issue, unique_name="sp:0"), streams)  # type: ignore[arg-type]
    first, second = later.begin([], "first"), later.begin([], "second")
    assert streams.log == [
        "main marks 1", "side waits for 1", "first on side", "side marks 2",
        "main marks 3", "side waits for 3", "second on side", "side marks 4",
    ]  # fmt: skip
    streams.log.clear()
    first.wait()
    first.wait()
    assert streams.log == ["main waits for 2"]
    # An ordinary call of the group is behind what is still under way; then the wait has nothing to do.
    issue("third")
    second.wait()
    issue("fourth")
    assert streams.log[1:] == ["main waits for 4", "third on main", "fourth on main"]
