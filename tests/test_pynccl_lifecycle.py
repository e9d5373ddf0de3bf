"""Both communicators: who they start from, where they find their library, when they are disabled, what they call."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fvops.device_communicators import library_connection
from fvops.device_communicators.library_loading import LibraryError, LibraryNotFoundError
from fvops.device_communicators.pyhccl import PyHcclCommunicator
from fvops.device_communicators.pyhccl_wrapper import HCCLLibrary
from fvops.device_communicators.pynccl import PyNcclCommunicator
from fvops.device_communicators.pynccl_wrapper import NCCLLibrary
from tests.doubles import bodies
from tests.doubles.build import build
from tests.harness import Ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the doubles stand on Linux futexes")

KINDS = {"nccl": PyNcclCommunicator, "hccl": PyHcclCommunicator}
LIBRARIES = {"nccl": NCCLLibrary, "hccl": HCCLLibrary}
both = pytest.mark.parametrize("which", ["nccl", "hccl"])


class Alone:
    """A group of one, of the least that a communicator can start from."""

    rank, world_size = 0, 1

    def broadcast_obj(self, obj: Any, src: int) -> Any:
        return obj


class OverStore:
    """A group over a torch.distributed.Store; its messages are numbered, so that none is read twice."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, unique_name: str) -> None:
        self.store, self.rank, self.world_size, self.unique_name = store, rank, world_size, unique_name
        self.messages = 0

    def broadcast_obj(self, obj: Any, src: int) -> Any:
        self.messages += 1
        key = f"{self.unique_name}/{self.messages}"
        if self.rank == src:
            self.store.set(key, obj)
        return self.store.get(key)


@both
def test_one_rank_alone_is_disabled_unless_allowed(which: str) -> None:
    comm = KINDS[which](Alone(), "cpu", build(f"{which}_double"))
    assert (comm.available, comm.disabled, comm.comm, comm.unique_id) == (False, True, None, None)
    assert (comm.rank, comm.world_size, comm.device) == (0, 1, torch.device("cpu"))
    with pytest.raises(RuntimeError, match=f"fvops.py{which}.all_reduce on group .*disabled: it has one rank"):
        comm.all_reduce(torch.ones(1))
    with pytest.raises(RuntimeError, match="disabled"):
        comm.group_start()
    comm.destroy()


@both
def test_one_rank_with_itself(which: str) -> None:
    comm = KINDS[which](Alone(), "cpu", build(f"{which}_double"), allow_single_rank=True)
    assert (comm.available, comm.disabled, comm.broken, comm.abort_reason) == (True, False, False, None)
    assert len(comm.unique_id or b"") == {"nccl": 128, "hccl": 4108}[which]
    if which == "nccl":
        assert (comm.nccl.comm_count(comm.comm), comm.nccl.comm_user_rank(comm.comm)) == (1, 0)
    else:
        assert (comm.hccl.get_rank_size(comm.comm), comm.hccl.get_rank_id(comm.comm)) == (1, 0)
    x, y = torch.arange(6.0).reshape(3, 2), torch.empty(3, 2)
    assert torch.equal(comm.all_reduce(x), x)
    for call in (comm.all_gather, comm.reduce_scatter, comm.all_to_all_single):
        y.zero_()
        call(y, x)
        assert torch.equal(y, x), call
    y.zero_()
    comm.group_start()
    comm.recv(y, 0)
    comm.send(x, 0)
    comm.group_end()
    assert torch.equal(y, x)
    comm.destroy()
    comm.destroy()
    with pytest.raises(RuntimeError, match="it was destroyed"):
        comm.all_reduce(x)


@both
def test_destroying_inside_a_group_is_refused(which: str) -> None:
    comm = KINDS[which](Alone(), "cpu", build(f"{which}_double"), allow_single_rank=True)
    comm.group_start()
    with pytest.raises(RuntimeError, match="a group is open"):
        comm.destroy()
    comm.group_end()
    comm.destroy()


def test_a_group_that_breaks_while_it_is_open_is_closed_by_the_next_call() -> None:
    path = build("nccl_double")
    comm = PyNcclCommunicator(Alone(), "cpu", path, allow_single_rank=True, group_name="mine")
    comm.group_start()
    bodies.double(path).double_fault(b"ncclSend", 1, 3, 4)  # an asynchronous error
    comm.send(torch.ones(3), 0)
    while not comm.broken:
        threading.Event().wait(0.01)
    with pytest.raises(RuntimeError, match=r"fvops.pynccl.recv on group 'mine': .* injected asynchronous error"):
        comm.recv(torch.ones(3), 0)
    with pytest.raises(LibraryError, match="without ncclGroupStart"):
        comm.nccl.group_end()
    comm.destroy()


def test_hccl_refuses_self_transfers_that_do_not_pair_up() -> None:
    comm = PyHcclCommunicator(Alone(), "cpu", build("hccl_double"), allow_single_rank=True)
    comm.group_start()
    comm.send(torch.ones(3), 0)
    comm.recv(torch.ones(2), 0)
    with pytest.raises(ValueError, match="do not pair up"):
        comm.group_end()
    assert comm.all_reduce(torch.ones(1)).item() == 1
    comm.destroy()


@both
def test_a_missing_library_disables_and_is_logged_once(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = mock.Mock()
    monkeypatch.setattr(library_connection.logger, "warning_once", said)
    comm = KINDS[which](Alone(), "cpu", f"/no/such/{which}.so", allow_single_rank=True)
    assert (comm.available, comm.disabled) == (False, True)
    said.assert_called_once()
    with pytest.raises(RuntimeError, match=f"cannot load /no/such/{which}.so"):
        comm.all_reduce(torch.ones(1))


@both
def test_the_environment_names_the_library(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build(f"{which}_double")
    monkeypatch.setenv(f"FVOPS_{which.upper()}_LIBRARY", path)
    assert LIBRARIES[which]().path == path
    monkeypatch.setenv(f"FVOPS_{which.upper()}_LIBRARY", "/no/such/one.so")
    with pytest.raises(LibraryNotFoundError, match=r"/no/such/one\.so"):  # asked for: no other is taken instead
        LIBRARIES[which]()
    assert LIBRARIES[which](path).path == path  # an argument comes first


@both
def test_a_library_without_the_functions_is_named(which: str) -> None:
    other = build({"nccl": "hccl", "hccl": "nccl"}[which] + "_double")
    with pytest.raises(
        LibraryNotFoundError, match=f"{other} has no function {which.capitalize() if which == 'hccl' else which}"
    ):
        LIBRARIES[which](other)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has loaded an NCCL of its own")
@pytest.mark.parametrize("found", ["wheel", "loaded"])
def test_a_loaded_library_comes_before_the_wheel(tmp_path: Path, found: str) -> None:
    places = {"wheel": tmp_path / "site/nvidia/nccl/lib/libnccl.so.2", "loaded": tmp_path / "libnccl.so.2.28"}
    for place in places.values():
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(build("nccl_double"), place)
    load = f"ctypes.CDLL({str(places['loaded'])!r})" if found == "loaded" else ""
    program = f"""
import ctypes, sys
sys.path.insert(0, {str(tmp_path / "site")!r})
from fvops.device_communicators.pynccl_wrapper import NCCLLibrary
{load}
print(NCCLLibrary().path)
"""
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "FVOPS_NCCL_LIBRARY": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.strip() == str(places[found]), done.stderr


@both
def test_what_cannot_serve_as_group_or_device_is_refused(which: str) -> None:
    make = KINDS[which]
    with pytest.raises(TypeError, match="rank, world_size and broadcast_obj; got int"):
        make(3, "cpu")
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised"):
        make(None, "cpu")
    with pytest.raises(ValueError, match="devices, got meta"):
        make(Alone(), "meta")
    assert PyNcclCommunicator(Alone(), 3).device == torch.device("cuda", 3)
    assert PyNcclCommunicator(Alone(), "cuda:1").device == torch.device("cuda", 1)
    assert PyNcclCommunicator(Alone()).device.type in ("cpu", "cuda")


def _over_its_own_backend(which: str) -> str:
    from fvops.device_communicators import library_bootstrap

    with mock.patch.object(library_bootstrap.dist, "get_backend", return_value=which):
        return bodies.text_of(lambda: KINDS[which](bodies.cpu_group(), "cpu"))


@both
def test_a_process_group_of_the_library_itself_is_refused(two_ranks: Ranks, which: str) -> None:
    for text in two_ranks.run(_over_its_own_backend, which):
        assert text.startswith("ValueError: needs a process group for CPU tensors")
        assert which in text


def _default_group(which: str, path: str) -> tuple[int, int, str, list[float]]:
    comm = KINDS[which](None, "cpu", path)
    library = comm.library
    asked = (
        (library.comm_user_rank, library.comm_count)
        if which == "nccl"
        else (library.get_rank_id, library.get_rank_size)
    )
    rank, size = (ask(comm.comm) for ask in asked)
    result = comm.all_reduce(torch.tensor([1.0, comm.rank])).tolist()
    same = comm.group_name == dist.group.WORLD.group_name
    comm.destroy()
    return rank, size, str(same), result


@both
def test_no_group_means_the_default_one(which: str) -> None:
    for rank, told in enumerate(Ranks.get(3).run(_default_group, which, build(f"{which}_double"))):
        assert told == (rank, 3, "True", [3.0, 3.0])


def _pairs(which: str, path: str) -> list[float]:
    """A communicator for each pair of ranks, over a store, and an exchange in it."""
    store, rank, P = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    received = []
    for a in range(P):
        for b in range(a + 1, P):
            if rank not in (a, b):
                continue
            name = f"pair {which} {a} {b}"
            comm = bodies.fresh(which, path, group=OverStore(store, int(rank == b), 2, name))
            assert comm.group_name == name
            got = torch.empty(3)
            comm.group_start()
            comm.send(torch.full((3,), float(rank)), 1 - comm.rank)
            comm.recv(got, 1 - comm.rank)
            comm.group_end()
            received.append(got.tolist()[2])
            comm.destroy()
    dist.barrier(group=bodies.cpu_group())
    return received


@both
def test_communicators_for_pairs_of_ranks_over_a_store(which: str) -> None:
    received = Ranks.get(3).run(_pairs, which, build(f"{which}_double"))
    assert received == [[1.0, 2.0], [0.0, 2.0], [0.0, 1.0]]


def _counts(which: str, path: str) -> dict[str, dict[str, int]]:
    """How often which library function was called for an even, an uneven and a grouped all-to-all."""
    comm, calls = bodies.communicator(which, path), bodies.double(path).double_calls
    names = {
        "nccl": ["ncclAlltoAll", "ncclSend", "ncclRecv", "ncclGroupEnd"],
        "hccl": ["HcclAlltoAll", "HcclAlltoAllV", "HcclSend", "HcclBatchSendRecv"],
    }[which]
    x, out = torch.arange(4), torch.empty(4, dtype=torch.int64)
    counted = {}
    for what in ("even", "uneven", "grouped"):
        before = {name: calls(name.encode()) for name in names}
        if what == "grouped":
            comm.group_start()
            comm.all_to_all_single(out, x)
            comm.send(x, 1 - comm.rank)
            received = torch.empty_like(x)
            comm.recv(received, 1 - comm.rank)
            comm.group_end()
            assert torch.equal(received, x)
        else:
            comm.all_to_all_single(out, x, *(([2, 2], [2, 2]) if what == "uneven" else (None, None)))
        assert out.tolist() == [2 * comm.rank, 2 * comm.rank + 1] * 2
        counted[what] = {name: calls(name.encode()) - before[name] for name in names}
    return counted


def test_nccl_uses_its_all_to_all_where_it_has_one_and_groups_otherwise(two_ranks: Ranks) -> None:
    grouped = {"ncclAlltoAll": 0, "ncclSend": 2, "ncclRecv": 2, "ncclGroupEnd": 1}
    in_group = {"ncclAlltoAll": 0, "ncclSend": 3, "ncclRecv": 3, "ncclGroupEnd": 2}
    for counted in two_ranks.run(_counts, "nccl", build("nccl_double")):
        whole = {"ncclAlltoAll": 1, "ncclSend": 0, "ncclRecv": 0, "ncclGroupEnd": 0}
        assert counted == {"even": whole, "uneven": grouped, "grouped": in_group}
    for counted in two_ranks.run(_counts, "nccl", build("nccl_double", ["NO_ALLTOALL"])):
        assert counted == {"even": grouped, "uneven": grouped, "grouped": in_group}


def test_hccl_sends_a_group_as_one_batch(two_ranks: Ranks) -> None:
    none = {"HcclAlltoAll": 0, "HcclAlltoAllV": 0, "HcclSend": 0, "HcclBatchSendRecv": 0}
    for counted in two_ranks.run(_counts, "hccl", build("hccl_double")):
        assert counted["even"] == {**none, "HcclAlltoAll": 1}
        assert counted["uneven"] == {**none, "HcclAlltoAllV": 1}
        assert counted["grouped"] == {**none, "HcclAlltoAll": 1, "HcclBatchSendRecv": 1}


def _unfinished(path: str) -> list[float]:
    """NCCL may leave a call unfinished: it is polled."""
    comm = bodies.fresh("nccl", path)
    bodies.double(path).double_fault(b"ncclAllReduce", 1, 4, 5)
    first = comm.all_reduce(torch.ones(1)).item()
    left = bodies.double(path).double_calls(b"ncclCommGetAsyncError")
    assert comm.all_reduce(torch.ones(1)).item() == first
    asked = bodies.double(path).double_calls(b"ncclCommGetAsyncError") - left
    comm.destroy()
    return [first, asked]


def test_a_call_that_nccl_leaves_in_progress_is_seen_through(two_ranks: Ranks) -> None:
    for total, asked in two_ranks.run(_unfinished, build("nccl_double")):
        assert total == 2
        assert asked <= 3  # nothing was left to poll


def test_which_reductions_the_libraries_have() -> None:
    nccl = PyNcclCommunicator(Alone(), "cpu", build("nccl_double"), allow_single_rank=True)
    hccl = PyHcclCommunicator(Alone(), "cpu", build("hccl_double"), allow_single_rank=True)
    ops = dist.ReduceOp
    assert nccl.reduces(torch.float8_e4m3fn)
    assert nccl.reduces(torch.float64, ops.AVG)
    assert nccl.reduces(torch.bool, ops.MAX)
    assert hccl.reduces(torch.bool, "min")
    assert hccl.reduces(torch.int16)
    assert hccl.reduces(torch.bfloat16, ops.AVG)
    for dtype, op in ((torch.int16, "sum"), (torch.bool, "sum"), (torch.complex64, "sum"), (torch.uint16, "max")):
        assert not nccl.reduces(dtype, op), (dtype, op)
    for dtype, op in ((torch.float64, "sum"), (torch.int16, "product"), (torch.uint8, "sum"), (torch.int32, "avg")):
        assert not hccl.reduces(dtype, op), (dtype, op)
    for comm in (nccl, hccl):
        comm.destroy()


def _sums(path: str, dtype: torch.dtype) -> torch.Tensor:
    comm = bodies.communicator("nccl", path)
    return comm.all_reduce(_terms(dtype)[comm.rank])


def _terms(dtype: torch.dtype) -> list[torch.Tensor]:
    """Two tensors of any magnitudes: sums that need rounding, to subnormals and across exponents too."""
    lot = torch.Generator().manual_seed(1)
    scale = 2.0 ** torch.randint(-12, 6, (4000,), generator=lot)
    return [(torch.randn(4000, generator=lot) * scale).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_doubles_small_floats_round_as_torch_does(two_ranks: Ranks, dtype: torch.dtype) -> None:
    a, b = (term.float() for term in _terms(dtype))
    expected = (a + b).to(dtype)
    for result in two_ranks.run(_sums, build("nccl_double"), dtype):
        assert torch.equal(result.float(), expected.float())
