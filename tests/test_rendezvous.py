"""Where rank 0 serves the world's store: on the address that the ranks go to, and on no other."""

from __future__ import annotations

import logging
import os
import socket
import time

import pytest
import torch
import torch.distributed as dist

from fvops import rendezvous
from tests.harness import Ranks
from tests.test_stateless_group import _free_port

# As /proc/net/tcp writes it, in the order of a little-endian machine's bytes.
_LOCALHOST = "0100007F"


def _listens_at(port: int) -> list[str]:
    """The addresses, as the kernel writes them, at which anyone on this machine listens on `port`."""
    found = []
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        if os.path.exists(table):
            with open(table) as lines:
                rows = [line.split() for line in lines][1:]
            found += [row[1].partition(":")[0] for row in rows if row[3] == "0A" and int(row[1][-4:], 16) == port]
    return found


def _twice(method: str, port: int) -> list[tuple[list[str], float]]:
    """A world made at `port`, used and taken down, and another one at the same port."""
    import fvops

    rank, P = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", str(port))
        for _ in range(2):
            fvops.init_distributed_environment(P, rank, method.format(port=port), rank, backend="gloo")
            fvops.initialize_model_parallel(1, P)
            total = fvops.get_sp_group().all_reduce(torch.ones(3))
            told.append((_listens_at(port), float(total[0])))
            # No barrier: who is done first begins anew first, while rank 0 may still serve the old store.
            fvops.cleanup_dist_env_and_memory()
    return told


@pytest.mark.parametrize("method", ["tcp://127.0.0.1:{port}", "env://"])
def test_rank_0_listens_on_the_given_address_only(ranks: Ranks, method: str) -> None:
    for told in ranks.run(_twice, method, _free_port(), initialize=False, deadline_s=100):
        assert told == [([_LOCALHOST], ranks.world_size)] * 2


def _alone(method: str) -> str:
    try:
        rendezvous.start_torch_distributed("gloo", method, 2, 0, None)
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FVOPS_TIMEOUT_S", "2")


def test_a_rank_that_does_not_come(brief: None) -> None:
    port = _free_port()
    text = _alone(f"tcp://127.0.0.1:{port}")
    assert text.startswith(
        f"the 2 ranks of the world did not meet at 127.0.0.1:{port}, where rank 0 listens, within 2 s"
    )
    assert "rank 1 did not come, says rank 0" in text
    assert _listens_at(port) == []


def test_rank_0_does_not_come(brief: None) -> None:
    port = _free_port()
    with pytest.raises(RuntimeError, match=f"at 127.0.0.1:{port}.* within 2 s: rank 0 did not come, says rank 1"):
        rendezvous.start_torch_distributed("gloo", f"tcp://127.0.0.1:{port}", 2, 1, None)


def _kept(port: int) -> list[float]:
    """Worlds at one port, while rank 0 keeps the first one's store, and with it the server."""
    import fvops

    rank, P = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    kept, told = [], []
    for _ in range(3):
        fvops.init_distributed_environment(P, rank, f"tcp://127.0.0.1:{port}", rank, backend="gloo")
        kept.append(dist.distributed_c10d._get_default_store() if rank == 0 else None)
        told.append(float(fvops.get_world_group().all_reduce(torch.ones(3))[0]))
        # No barrier: who is done first begins anew first.
        fvops.cleanup_dist_env_and_memory()
    return told


def test_worlds_at_one_port_do_not_meet(ranks: Ranks) -> None:
    assert (
        ranks.run(_kept, _free_port(), initialize=False, deadline_s=100) == [[ranks.world_size] * 3] * ranks.world_size
    )


def test_a_new_process_does_not_join_an_old_world() -> None:
    """Rank 1 died and was started anew, while rank 0 still serves the world that it had been in."""
    port = _free_port()
    until = time.monotonic() + 5
    descriptor = rendezvous._listening_descriptor("127.0.0.1", port)
    old, world = rendezvous._serve(descriptor, "127.0.0.1", port, until)
    assert rendezvous._find("127.0.0.1", port, 1, until)[1] == world
    with pytest.raises(RuntimeError, match="the server of an earlier world is still there, and no later one came"):
        rendezvous._find("127.0.0.1", port, 1, time.monotonic() + 0.5)
    # Rank 0 begins anew in the process whose store is in use still.
    assert rendezvous._listening_descriptor("127.0.0.1", port) is None
    again, later = rendezvous._serve(None, "127.0.0.1", port, until)
    assert rendezvous._find("127.0.0.1", port, 1, until)[1] == later != world
    del old, again


def test_a_server_that_answers_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    port = _free_port()
    served, _ = rendezvous._serve(
        rendezvous._listening_descriptor("127.0.0.1", port), "127.0.0.1", port, time.monotonic() + 5
    )

    def get(store: dist.TCPStore, key: str) -> bytes:
        raise dist.DistNetworkError("Connection reset by peer")

    monkeypatch.setattr(dist.TCPStore, "get", get)
    with pytest.raises(RuntimeError, match="the server answered no more: Connection reset by peer"):
        rendezvous._find("127.0.0.1", port, 1, time.monotonic() + 0.5)
    del served


def test_an_address_of_another_machine(brief: None) -> None:
    text = _alone("tcp://192.0.2.1:29999")  # of a range that is never given to a machine
    assert text.startswith("rank 0 cannot listen on 192.0.2.1:29999, which must be an address of its machine")
    assert "FVOPS_STORE_LISTEN" in text


def test_a_port_that_another_process_has(brief: None) -> None:
    def elsewhere(_: int) -> bool:
        return False

    with socket.socket() as taken, pytest.MonkeyPatch.context() as patch:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        patch.setattr(rendezvous, "_is_served_here", elsewhere)
        port = taken.getsockname()[1]
        assert f"rank 0 cannot listen on 127.0.0.1:{port}" in _alone(f"tcp://127.0.0.1:{port}")


def test_a_rank_outside_the_world() -> None:
    with pytest.raises(ValueError, match="rank=2 is not in a world of 2"):
        rendezvous.start_torch_distributed("gloo", "env://", 2, 2, None)


def test_what_is_served_here_is_known() -> None:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        port = own.getsockname()[1]
        assert not rendezvous._is_served_here(port)
        own.listen()
        assert rendezvous._is_served_here(port)
    assert not rendezvous._is_served_here(port)


@pytest.fixture
def a_name_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> str:
    """A name that is loopback here, as a machine's own name is where /etc/hosts says so."""
    real = socket.getaddrinfo

    def resolve(host: str, *args: object, **more: object) -> object:
        return real("127.0.1.1" if host == "thisnode" else host, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return "thisnode"


def test_a_name_that_others_know_by_another_address(
    a_name_for_this_machine: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    port = _free_port()
    with caplog.at_level(logging.WARNING, logger="fvops"):
        os.close(rendezvous._listening_descriptor(a_name_for_this_machine, port) or -1)
        assert "rank 0 listens on 127.0.1.1 only, for that is what thisnode is on this machine" in caplog.text
        assert "FVOPS_STORE_LISTEN" in caplog.text
        caplog.clear()
        monkeypatch.setenv("FVOPS_STORE_LISTEN", "127.0.0.1")
        descriptor = rendezvous._listening_descriptor(a_name_for_this_machine, port)
        assert descriptor is not None
        assert _listens_at(port) == [_LOCALHOST]
        os.close(descriptor)
        assert caplog.text == ""
