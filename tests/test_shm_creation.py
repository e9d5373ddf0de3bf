"""Segments come for all ranks or for none, leave nothing behind, and stay within their group."""

from __future__ import annotations

import functools
import gc
import os
import signal
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests import reference
from tests.harness import RankFailure, Ranks
from tests.remains import held
from tests.shm_calls import Call, agree, fresh_transport, perform
from tests.worlds import initialized


@pytest.fixture
def another_node() -> Iterator[str]:
    """A folder that stands for another node's /dev/shm; in ours, for a disk may be too full for a pool."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield folder


def _try(options: list[dict[str, Any]]) -> tuple[bool, str]:
    import fvops
    from fvops.device_communicators.shm import ShmTransport

    group = fvops.get_sp_group()
    group.barrier()
    with _folder() as folder:
        # Twice: the first makes gloo open connections that it keeps.
        for _ in range(2):
            before = _belongings(folder)
            group.barrier()
            transport, words = ShmTransport.create(
                group.cpu_group, "test", **{"folder": folder} | options[group.rank_in_group]
            )
            group.barrier()
        after = _belongings(folder)
        group.barrier()
        assert after == before, (before, after)
    return transport is None, words


@contextmanager
def _folder() -> Iterator[str]:
    """A folder in /dev/shm for these workers alone: others on this machine may be running tests too."""
    import fvops

    folder = f"/dev/shm/tests-{os.getppid()}"
    os.makedirs(folder, exist_ok=True)
    fvops.get_sp_group().barrier()
    try:
        yield folder
    finally:
        fvops.get_sp_group().barrier()
        if fvops.get_sp_group().rank_in_group == 0:
            os.rmdir(folder)


def _belongings(folder: str) -> tuple[int, list[str]]:
    gc.collect()
    return len(os.listdir("/proc/self/fd")), os.listdir(folder)


@pytest.mark.parametrize(
    ("odd_one", "reason"),
    [
        ({"refusal": "FVOPS_TRANSPORT=gloo"}, "place 1: FVOPS_TRANSPORT=gloo"),
        ({"folder": "another node's"}, "different nodes"),
        ({"folder": "/nowhere"}, "place 1: there is no /nowhere"),
        ({"segment_bytes": 4096}, "place 1: a segment of 4096 bytes (FVOPS_SHM_SEGMENT_MB) is below"),
        ({"segment_bytes": 32 << 20}, "place 1 wants another layout"),
    ],
)
def test_one_rank_that_cannot_is_enough_for_all(another_node: str, odd_one: dict[str, Any], reason: str) -> None:
    odd_one = {name: another_node if value == "another node's" else value for name, value in odd_one.items()}
    options: list[dict[str, Any]] = [{}, odd_one, {}]
    told = Ranks.get(3).run(_try, options)
    assert all(none for none, _ in told)
    assert all(reason in words for _, words in told), told
    assert len({words for _, words in told}) == 1 or "nodes" in reason


def _two_nodes(another_node: str) -> tuple[bool, bool, list[Any]]:
    """Four ranks, two on each node: the world gets no segments, each node's pair gets its own."""
    import fvops
    from fvops.device_communicators.shm import ShmTransport

    with initialized(1, 2):
        world, pair = fvops.get_world_group(), fvops.get_sp_group()
        folder = "/dev/shm" if world.rank < 2 else another_node
        whole, _ = ShmTransport.create(world.cpu_group, "world", folder=folder)
        transport, words = ShmTransport.create(pair.cpu_group, "pair", folder=folder, eager_bytes=0, timeout_s=30.0)
        assert transport is not None, words
        results = []
        for call in _pair_calls(world.rank // 2):
            results.append(perform(transport, call, call.input(transport.rank)))
        transport.barrier()
        transport.close()
        return whole is None, folder in words, [None if y is None else y.clone() for y in results]


def _pair_calls(node: int) -> list[Call]:
    kinds = ["contiguous", "strided"]
    return [
        Call("all_gather", (3, 400), torch.float32, kinds, 7 + 1000 * node, {"dim": 1}),
        Call("all_reduce", (900,), torch.float32, kinds, 8 + 1000 * node, {"op": "sum"}),
    ]


def test_groups_on_two_nodes(another_node: str) -> None:
    told = Ranks.get(4).run(_two_nodes, another_node, initialize=False)
    for node in (0, 1):
        for number, call in enumerate(_pair_calls(node)):
            agree(call, [told[rank][2][number] for rank in (2 * node, 2 * node + 1)], 2)
    assert all(no_world and named for no_world, named, _ in told)


def _ops_over_two_nodes(another_node: str) -> tuple[list[str], list[torch.Tensor]]:
    """The world's collectives and the pair's, as a program calls them, with two ranks on each node."""
    import fvops
    from fvops import registry
    from fvops.device_communicators.shm import ShmTransport

    rank = int(os.environ["RANK"])
    on_node = functools.partial(ShmTransport.create, folder="/dev/shm" if rank < 2 else another_node)
    with mock.patch.object(ShmTransport, "create", on_node), initialized(1, 2):
        world, pair = fvops.get_world_group(), fvops.get_sp_group()
        used = [registry.resolve(group.unique_name, group.world_size).transport.name for group in (world, pair)]
        x = _input(rank)
        results = [world.all_to_all_4D(x), world.all_reduce(x), world.all_gather(x, 1), pair.all_to_all_4D(x)]
        return used, [y.clone() for y in results]


def _input(rank: int) -> torch.Tensor:
    return torch.arange(2 * 3 * 8 * 5, dtype=torch.float32).reshape(2, 3, 8, 5) + 1000 * rank


def test_ops_over_two_nodes(another_node: str) -> None:
    told = Ranks.get(4, "auto").run(_ops_over_two_nodes, another_node, initialize=False)
    x = [_input(rank) for rank in range(4)]
    exchanged = reference.all_to_all_4D(x, 2, 1)
    near = [reference.all_to_all_4D(x[first : first + 2], 2, 1) for first in (0, 2)]
    for rank, ((of_world, of_pair), results) in enumerate(told):
        assert ("gloo" in of_world, "shared memory" in of_pair) == (True, True), (of_world, of_pair)
        expected = [exchanged[rank], sum(x), torch.cat(x, 1), near[rank // 2][rank % 2]]
        for y, wanted in zip(results, expected, strict=True):
            assert torch.equal(y, wanted)


def _come_and_go(rounds: int) -> list[str]:
    """What is there during a transport's life, and whether anything is left of it."""
    import fvops

    complaints = []
    group = fvops.get_sp_group()
    group.barrier()
    with _folder() as folder:
        before = _belongings(folder)
        group.barrier()
        for _ in range(rounds):
            complaints += _one_life(folder)
            group.barrier()
        if _belongings(folder) != before:
            complaints.append(f"{before} became {_belongings(folder)}")
    return complaints


def _one_life(folder: str) -> list[str]:
    complaints = []
    mapped = held()["mapped segments"]
    with fresh_transport(segment_bytes=8 << 20, eager_bytes=0, folder=folder) as transport:
        x = torch.ones(1000)
        y = transport.empty((1000,), torch.float32)
        transport.all_reduce(y, x, "sum")
        if os.listdir(folder):
            complaints.append("a name in /dev/shm")
        if held()["mapped segments"] - mapped < transport.world_size:
            complaints.append(f"{held()} does not count {transport.world_size} new segments")
        maps = [line for line in open("/proc/self/maps") if folder in line]  # noqa: SIM115
        if len(maps) < transport.world_size or not all("(deleted)" in line for line in maps):
            complaints.append(f"mappings {maps}")
        modes = {
            stat.S_IMODE(os.stat(f"/proc/self/fd/{number}").st_mode)
            for number in os.listdir("/proc/self/fd")
            if _target(number).startswith(folder)
        }
        if modes != {0o600}:
            complaints.append(f"modes {modes}")
        transport.barrier()
    transport.close()
    if float(y.sum()) != 1000 * transport.world_size:
        complaints.append("the result did not outlive its transport")
    return complaints


def _target(number: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""


def test_a_transport_leaves_nothing_behind(ranks: Ranks) -> None:
    assert ranks.run(_come_and_go, 3) == [[]] * ranks.world_size


def _killed_while_creating(folder: str, told: str, step: int) -> None:
    """Place 1 kills itself when it would tell the others for the `step`-th time; they write down what they are told."""
    import fvops
    from fvops.device_communicators.shm import ShmTransport, creation

    group, tell = fvops.get_sp_group(), creation._tell
    steps = iter((1, 2))

    def tell_or_die(*args: Any) -> Any:
        if next(steps) == step and group.rank_in_group == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return tell(*args)

    gc.collect()
    before = held()["open segments"]
    with (
        mock.patch.object(creation, "_tell", tell_or_die),
        pytest.raises(RuntimeError) as caught,
    ):
        ShmTransport.create(group.cpu_group, "test", folder=folder)
    text = str(caught.value)
    # The traceback holds what was mapped.
    del caught
    gc.collect()
    assert held()["open segments"] == before
    Path(told, f"{group.rank_in_group}").write_text(text)


@pytest.mark.parametrize("step", [1, 2])
def test_a_rank_killed_while_segments_are_made_leaves_nothing(another_node: str, tmp_path: Path, step: int) -> None:
    """Killed with its file made and not told yet, and with the others' opened."""
    with pytest.raises(RankFailure, match="exit code -9"):
        Ranks.get(3).run(_killed_while_creating, another_node, str(tmp_path), step, deadline_s=60)
    assert os.listdir(another_node) == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0", "2"]


def _addresses() -> list[str]:
    """What is said of a file that is not there, of another's, and of a shorter one."""
    from fvops.device_communicators.shm import unnamed_file

    folder = "/dev/shm"
    descriptor = unnamed_file.create(folder)
    os.ftruncate(descriptor, 4096)
    here = unnamed_file.address_of(descriptor, folder)
    os.close(unnamed_file.open_other(here, folder, 4096))
    told = []
    for address, nbytes in (
        (replace(here, boot_id="another machine's"), 4096),
        (replace(here, folder="/another"), 4096),
        (replace(here, namespace=1), 4096),
        (replace(here, descriptor=10_000), 4096),
        (replace(here, inode=here.inode + 1), 4096),
        (here, 8192),
    ):
        with pytest.raises((OSError, RuntimeError)) as caught:
            unnamed_file.open_other(address, folder, nbytes)
        told.append(
            f"{type(caught.value).__name__}: {caught.value}".replace(str(here.pid), "N").replace(
                f"fd/{descriptor}", "fd/M"
            )
        )
    with pytest.raises(ValueError, match="format"):
        unnamed_file.open_other(replace(here, pid="self/../1"), folder, 4096)  # type: ignore[arg-type]
    os.close(descriptor)
    with pytest.raises(OSError):
        unnamed_file.open_other(here, folder, 4096)
    return told


def test_only_the_file_that_was_announced_is_opened() -> None:
    assert _addresses() == [
        "FileNotFoundError: process N is on another node",
        "FileNotFoundError: process N is on another node",
        "RuntimeError: process N is in another pid namespace, its death could not be seen",
        "ProcessLookupError: process N has ended or closed its file",
        "PermissionError: /proc/N/fd/M is not the file that was announced",
        "PermissionError: /proc/N/fd/M is not the file that was announced",
    ]


def _fork() -> str:
    with fresh_transport() as transport:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            text = "no error"
            try:
                transport.barrier()
            except RuntimeError as error:
                text = str(error)
            os.write(writer, text.encode())
            os._exit(0)
        os.close(writer)
        text = os.read(reader, 1000).decode()
        os.close(reader)
        os.waitpid(child, 0)
        transport.barrier()
        return text


def test_a_forked_child_is_refused(two_ranks: Ranks) -> None:
    assert all("forked child" in text for text in two_ranks.run(_fork))


def _soak(rounds: int, settled: int) -> list[tuple[int, int, list[str]]]:
    """(resident bytes, descriptors, names) after `settled` calls and at the end."""
    import random

    from tests.shm_calls import CONFIGURATIONS

    told = []
    draw = random.Random(5)
    with (
        _folder() as folder,
        fresh_transport(**CONFIGURATIONS["plain"] | {"eager_bytes": 2048}, folder=folder) as transport,
    ):
        P = transport.world_size
        for number in range(rounds):
            op, size = (
                draw.choice(["all_gather", "all_reduce", "reduce_scatter", "broadcast", "ring"]),
                draw.choice([1, 100, 3000, 50_000]),
            )
            args: dict[str, Any] = {}
            if op in ("all_gather", "reduce_scatter"):
                args["dim"] = 0
            if op in ("all_reduce", "reduce_scatter"):
                args["op"] = "sum"
            if op == "broadcast":
                args["src"] = draw.randrange(P)
            x = torch.full((size * P,), float(transport.rank))
            perform(transport, Call(op, (size * P,), torch.float32, [], 0, args), x)
            if number + 1 in (settled, rounds):
                with open("/proc/self/statm") as file:
                    resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                told.append((resident, *_belongings(folder)))
        transport.barrier()
    return told


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_hundred_thousand_calls_leave_memory_and_descriptors_as_they_were(world_size: int) -> None:
    for early, late in Ranks.get(world_size).run(_soak, 100_000, 1_000, deadline_s=1800):
        assert late[1:] == early[1:]
        assert late[0] <= 1.02 * early[0]


def test_calls_in_a_row_keep_descriptors(two_ranks: Ranks) -> None:
    for early, late in two_ranks.run(_soak, 600, 200):
        assert late[1:] == early[1:]
