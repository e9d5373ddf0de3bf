"""Ranks that die, stop, leave or call something else: who waits for them is told in time, and who it was."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import RankFailure, Ranks
from tests.shm_calls import fresh_transport


def _all_reduce(transport: Any, size: int = 50_000) -> None:
    transport.all_reduce(transport.empty((size,), torch.float32), torch.ones(size), "sum")


def _error_of(call: Callable[[], Any]) -> tuple[str, float]:
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        call()
    return str(caught.value), time.monotonic() - start


def _die(folder: str, waiting: str) -> None:
    """Place 1 kills itself while the others wait for it; they write down what they were told and when."""
    import torch.distributed as dist

    with fresh_transport(eager_bytes=0) as transport:
        me, P = transport.rank, transport.world_size
        _all_reduce(transport)
        calls = {
            "all_reduce": lambda: _all_reduce(transport),
            "barrier": transport.barrier,
            "recv": lambda: transport.recv(torch.empty(3), 1),
            # A chain: place 0 waits for the dead one, place 2 for place 0.
            "broadcast": lambda: transport.broadcast(transport.empty((9,), torch.float32), torch.ones(9), 0),
        }
        store = dist.distributed_c10d._get_default_store()
        if me == 1:
            store.set("fvops-test/about-to-die", "")
            os.kill(os.getpid(), signal.SIGKILL)
        store.wait(["fvops-test/about-to-die"])
        first, seconds = _error_of(calls[waiting])
        second, _ = _error_of(lambda: _all_reduce(transport))
        sent, _ = _error_of(lambda: transport.send(torch.ones(3), (me + 1) % P))
        Path(folder, f"{me}").write_text("\n".join([f"{seconds}", first, second, sent]))


@pytest.mark.parametrize(
    "waiting", ["all_reduce", *(pytest.param(op, marks=pytest.mark.slow) for op in ("barrier", "recv", "broadcast"))]
)
def test_a_death_is_told_within_two_seconds(tmp_path: Path, waiting: str) -> None:
    with pytest.raises(RankFailure, match="exit code -9"):
        Ranks.get(3).run(_die, str(tmp_path), waiting, deadline_s=60)
    for place in (0, 2):
        seconds, first, second, sent = (tmp_path / f"{place}").read_text().splitlines()
        assert float(seconds) < 2
        assert "place 1" in first
        assert "has died" in first or "gave up waiting for place 1" in first
        for later in (second, sent):
            assert "broken since an earlier error" in later
            assert first in later


def _stop(limit: float) -> tuple[str, float]:
    """Place 0 stops place 1 for a while; the others wait for it."""
    import torch.distributed as dist

    import fvops

    with fresh_transport(timeout_s=limit, eager_bytes=0) as transport:
        group = fvops.get_sp_group()
        pids = group.all_gather(torch.tensor([os.getpid()]), 0).tolist()
        text, seconds = "", 0.0
        group.barrier()
        store = dist.distributed_c10d._get_default_store()
        if transport.rank == 0:
            os.kill(pids[1], signal.SIGSTOP)
            store.set("fvops-test/stopped", "")
        elif transport.rank == 2:
            store.wait(["fvops-test/stopped"])
        try:
            if transport.rank != 1:
                text, seconds = _error_of(lambda: _all_reduce(transport))
        finally:
            if transport.rank == 0:
                os.kill(pids[1], signal.SIGCONT)
        group.barrier()
        if transport.rank == 1:
            text, seconds = _error_of(lambda: _all_reduce(transport))
        group.barrier()
        return text, seconds


def test_a_stopped_rank_is_told_at_the_deadline() -> None:
    first, (text1, _), third = Ranks.get(3).run(_stop, 1.5)
    # Who started to wait first tells it, at its deadline. The other may learn it from that one, or find place 1 running
    # again at its own deadline.
    told = [seconds for text, seconds in (first, third) if "did not come within 1.5 s; its process is stopped" in text]
    assert told
    assert all(1.5 <= seconds < 10 for seconds in told)
    for text, _ in (first, third):
        assert "did not come within 1.5 s" in text or "gave up waiting for place 1" in text
        assert "place 1" in text
    # The others have given up by then, because of this one.
    assert "gave up with an error of its own" in text1


def _leave() -> str:
    import fvops

    with fresh_transport() as transport:
        transport.barrier()
        if transport.rank == 0:
            transport.close()
            text = _error_of(transport.barrier)[0]
        else:
            text = _error_of(transport.barrier)[0]
        fvops.get_sp_group().barrier()
        transport.close()
        return text


def test_a_rank_that_has_left_is_said_to_have(two_ranks: Ranks) -> None:
    closed, left = two_ranks.run(_leave)
    assert "closed: the group was destroyed" in closed
    assert "place 0" in left
    assert "has left the group" in left


def _disagree(kind: str, options: dict[str, Any]) -> str:
    import fvops

    with fresh_transport(timeout_s=5.0, **options) as transport:
        me, P = transport.rank, transport.world_size

        def call() -> None:
            if kind == "ops" and me == 0:
                transport.all_gather(transport.empty((P, 2000), torch.float32), torch.ones(2000))
            elif kind == "ops" and options:
                transport.broadcast(transport.empty((2000,), torch.float32), torch.ones(2000), 1)
            elif kind == "messages":
                transport.send(torch.ones(3), 1 - me)
                transport.recv(torch.ones(4), 1 - me)
            else:
                size = 2000 + (me == 0) if kind == "sizes" else 2000
                transport.all_reduce(transport.empty((size,), torch.float32), torch.ones(size), "sum")

        text = _error_of(call)[0]
        fvops.get_sp_group().barrier()
        return text


@pytest.mark.parametrize("options", [{}, {"eager_bytes": 0}], ids=["eager", "posted"])
@pytest.mark.parametrize("kind", ["ops", "sizes", "messages"])
def test_ranks_that_call_different_things_are_told_so(two_ranks: Ranks, kind: str, options: dict[str, Any]) -> None:
    texts = two_ranks.run(_disagree, kind, options)
    assert any("every rank must issue the same call" in text for text in texts), texts
    assert all("place" in text for text in texts)


def _disagree_on_rows() -> str:
    """Place 1 expects a row more from place 0 than that sends."""
    import fvops

    with fresh_transport(timeout_s=5.0) as transport:
        expected = [20 + transport.rank, 20]
        y = transport.empty((sum(expected), 3), torch.float32)
        text = _error_of(lambda: transport.exchange_rows(y, torch.ones(40, 3), expected, [20, 20]))[0]
        fvops.get_sp_group().barrier()
        return text


def test_split_sizes_that_do_not_match_are_told(two_ranks: Ranks) -> None:
    wrong, waited = two_ranks.run(_disagree_on_rows)
    assert "place 1 called all_to_all_single with parts of 252 bytes, this rank all_to_all_single" in wrong
    assert "place 0" in waited or "must have" in waited


def _refuse() -> list[str]:
    with fresh_transport() as transport:
        x = torch.ones(3)
        with pytest.raises(ValueError, match="unknown reduction 'xor'") as caught:
            transport.all_reduce(x.clone(), x, "xor")
        # Refused before anything was sent: the transport is as good as before.
        _all_reduce(transport)
        transport.barrier()
        return [str(caught.value)]


def test_a_refusal_does_not_break_the_transport(two_ranks: Ranks) -> None:
    assert all("product" in text for (text,) in two_ranks.run(_refuse))


def _unreceived() -> str:
    import fvops

    text = ""
    with fresh_transport(timeout_s=1.0, slot_bytes=4096) as transport:
        if transport.rank == 0:
            transport.send(torch.ones(100_000), 1)
            text = _error_of(transport.close)[0]
        fvops.get_sp_group().barrier()
    return text


def test_a_send_that_nobody_receives_is_reported_at_close(two_ranks: Ranks) -> None:
    assert "sends to places [1] were not received within 1 s" in two_ranks.run(_unreceived)[0]
