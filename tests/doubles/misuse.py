"""Calls that must not work: refused by the communicator before anything is sent, or caught by the double itself."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from tests.doubles.bodies import communicator, cpu_group, double, text_of

__all__ = ["expected", "handles", "names", "raw", "refusals"]

FLOAT32 = {"nccl": 7, "hccl": 4}
INT32 = {"nccl": 2, "hccl": 2}
SUM, MAX = 0, 2
# More than the double's mailbox holds, in float32: the sender cannot be done before the receiver has looked.
MANY = 50_000
_COLLECTIVES = ("AllReduce", "Reduce", "AllGather", "ReduceScatter", "Broadcast", "Send", "Recv", "AlltoAll")


def refusals(which: str, path: str) -> tuple[list[tuple[str, str, str]], int]:
    """(what, the error that it must be, the error that it was) for each; and how many library calls there were."""
    comm, count = communicator(which, path), double(path).double_calls
    other = 1 - comm.rank
    x, twice = torch.ones(4, 2), torch.ones(8, 2)
    wide = torch.ones(4, 4)[:, ::2]
    attempts: list[tuple[str, str, Callable[[], Any]]] = [
        ("strides", "ValueError", lambda: comm.all_reduce(wide)),
        ("strides of an output", "ValueError", lambda: comm.recv(wide, other)),
        ("expanded", "ValueError", lambda: comm.broadcast(torch.ones(1).expand(3), 0)),
        ("device", "ValueError", lambda: comm.all_reduce(torch.ones(3, device="meta"))),
        ("sparse", "ValueError", lambda: comm.all_reduce(torch.eye(2).to_sparse())),
        ("conjugate", "ValueError", lambda: comm.send(torch.ones(2, dtype=torch.complex64).conj(), other)),
        ("no tensor", "TypeError", lambda: comm.all_reduce([1.0])),
        ("stream", "TypeError", lambda: comm.all_reduce(x, stream=object())),
        ("complex sum", "TypeError", lambda: comm.all_reduce(x.to(torch.complex64))),
        ("bool sum", "TypeError", lambda: comm.all_reduce(x.bool())),
        ("integer average", "TypeError", lambda: comm.all_reduce(x.int(), torch.distributed.ReduceOp.AVG)),
        ("unknown op", "ValueError", lambda: comm.all_reduce(x, "median")),
        ("two dtypes", "TypeError", lambda: comm.all_gather(twice.double(), x)),
        ("small output", "ValueError", lambda: comm.all_gather(x.clone(), x)),
        ("uneven input", "ValueError", lambda: comm.reduce_scatter(x.clone(), x)),
        ("root", "ValueError", lambda: comm.broadcast(x, 2)),
        ("negative root", "ValueError", lambda: comm.reduce(x, -1)),
        ("peer", "ValueError", lambda: comm.send(x, 7)),
        ("oneself", "ValueError", lambda: comm.send(x, comm.rank)),
        ("rows", "ValueError", lambda: comm.all_to_all_single(torch.ones(3, 2), torch.ones(3, 2))),
        ("split sizes", "ValueError", lambda: comm.all_to_all_single(x.clone(), x, [2, 2], [2, 1])),
        ("output rows", "ValueError", lambda: comm.all_to_all_single(x.clone(), x, [2, 1], [2, 2])),
        ("one list", "ValueError", lambda: comm.all_to_all_single(x.clone(), x, [2, 2])),
        ("in place", "ValueError", lambda: comm.all_to_all_single(x, x)),
        ("no group", "RuntimeError", comm.group_end),
        ("int16" if which == "nccl" else "float64", "TypeError", lambda: comm.all_reduce(_unreduced(which))),
    ]  # fmt: skip
    prefix = "Hccl" if which == "hccl" else "nccl"
    before = sum(count(f"{prefix}{name}".encode()) for name in _COLLECTIVES)
    lines = [(what, wanted, text_of(attempt)) for what, wanted, attempt in attempts]
    sent = sum(count(f"{prefix}{name}".encode()) for name in _COLLECTIVES) - before
    assert comm.all_reduce(x).tolist() == (2 * x).tolist()  # and it still works
    return lines, sent


def _unreduced(which: str) -> torch.Tensor:
    return torch.ones(2, dtype=torch.int16 if which == "nccl" else torch.float64)


# Raw misuse: what both ranks do (0 and 1), and a piece of the text that both must get.


class Raw:
    """One rank's end of a new communicator of the double, below fvops' communicator."""

    def __init__(self, which: str, path: str, rank: int) -> None:
        module = importlib.import_module(f"fvops.device_communicators.py{which}_wrapper")
        self.which, self.rank = which, rank
        self.lib = {"nccl": "NCCLLibrary", "hccl": "HCCLLibrary"}[which]
        self.lib = getattr(module, self.lib)(path)
        self.f32, self.i32 = FLOAT32[which], INT32[which]
        self.x, self.y = torch.ones(2 * MANY), torch.zeros(2 * MANY)
        self.send, self.recv = self.x.data_ptr(), self.y.data_ptr()
        self.comm = self.init(self.new_id(), 2, rank)

    def new_id(self) -> bytes:
        size = 128 if self.which == "nccl" else 4108
        data = bytes(size)
        if self.rank == 0:
            data = self.lib.get_unique_id() if self.which == "nccl" else self.lib.get_root_info()
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        torch.distributed.broadcast(buffer, 0, group=cpu_group())
        return buffer.numpy().tobytes()

    def init(self, unique_id: bytes, world_size: int, rank: int) -> int:
        lib = self.lib
        start = lib.comm_init_rank if self.which == "nccl" else lib.comm_init_root_info
        return start(world_size, unique_id, rank)

    def all_reduce(self, count: int = 4, dtype: int | None = None, op: int = SUM) -> None:
        self.lib.all_reduce(self.send, self.recv, count, self.f32 if dtype is None else dtype, op, self.comm, None)

    def broadcast(self, root: int) -> None:
        buffers = (self.send, self.recv) if self.which == "nccl" else (self.send,)
        self.lib.broadcast(*buffers, 4, self.f32, root, self.comm, None)

    def pair(self, send: tuple[int, int], recv: tuple[int, int], sender: int = 0) -> None:
        """From `sender` to the other, each with its own (count, dtype)."""
        if self.rank == sender:
            self.lib.send(self.send, *send, 1 - self.rank, self.comm, None)
        else:
            self.lib.recv(self.recv, *recv, 1 - self.rank, self.comm, None)

    def all_to_all_v(self, sends: list[int], recvs: list[int]) -> None:
        self.lib.all_to_all_v(self.send, sends, self.recv, recvs, self.f32, self.comm, None)

    def batch(self, peer: int, kind_of_item: int | None = None) -> None:
        from fvops.device_communicators.pyhccl_wrapper import SendRecvItem, Transfer

        if kind_of_item is None:
            transfer = Transfer(self.rank == 0, self.send, MANY, self.f32, peer)
            self.lib.batch_send_recv([transfer], self.comm, None)
        else:
            item = (SendRecvItem * 1)(SendRecvItem(kind_of_item, self.send, 1, self.f32, peer))
            self.lib._call("HcclBatchSendRecv", item, 1, self.comm, None)


def _grouped_mistake(r: Raw) -> None:
    """The mistake is reported at once, and again by the end of the group."""
    r.lib.group_start()
    first = text_of(lambda: r.all_reduce(dtype=99 if r.rank == 0 else None))
    r.lib.group_end()
    assert first or r.rank == 1


def _lone_self_send(r: Raw) -> None:
    r.lib.group_start()
    try:
        if r.rank == 0:
            r.lib.send(r.send, 4, r.f32, 0, r.comm, None)
        r.all_reduce()
    finally:
        r.lib.group_end()


def _destroy_in_group(r: Raw) -> None:
    if r.rank == 1:
        r.all_reduce()
        return
    r.lib.group_start()
    try:
        r.lib.comm_destroy(r.comm)
    finally:
        r.lib.group_end()


_BOTH: dict[str, tuple[str, Callable[[Raw], None]]] = {
    "counts": ("count 5", lambda r: r.all_reduce(count=4 + r.rank)),
    "dtypes": ("AllReduce", lambda r: r.all_reduce(dtype=(r.f32, r.i32)[r.rank])),
    "ops": ("op 2", lambda r: r.all_reduce(op=(SUM, MAX)[r.rank])),
    "roots": ("root 1", lambda r: r.broadcast(r.rank)),
    "collectives": ("Broadcast", lambda r: r.all_reduce() if r.rank else r.broadcast(0)),
    "no dtype": ("is no datatype", lambda r: r.all_reduce(dtype=None if r.rank else 12)),
    "negative dtype": ("is no datatype", lambda r: r.all_reduce(dtype=None if r.rank else -1)),
    "no op": ("is no reduction", lambda r: r.all_reduce(op=SUM if r.rank else 17)),
    "no root": ("is no rank of 2", lambda r: r.broadcast(0 if r.rank else 2)),
    "no peer": ("is no rank of 2", lambda r: _to(r, 7) if r.rank == 0 else r.all_reduce()),
    "self": ("is this rank", lambda r: _to(r, 0) if r.rank == 0 else r.all_reduce()),
    "null": ("null buffer", lambda r: _null(r) if r.rank == 0 else r.all_reduce()),
    "received less": (f"sends {MANY}", lambda r: r.pair((MANY, r.f32), (MANY - 1, r.f32))),
    "received more": (f"sends {MANY}", lambda r: r.pair((MANY, r.f32), (MANY + 1, r.f32), sender=1)),
    "received otherwise": ("of datatype", lambda r: r.pair((MANY, r.f32), (MANY, r.i32))),
}
_NCCL: dict[str, tuple[str, Callable[[Raw], None]]] = {
    "mistake in a group": ("is no datatype", _grouped_mistake),
    "lone self send": ("self sends exceed", _lone_self_send),
    "destroyed in a group": ("inside a group", _destroy_in_group),
    "all-to-all in place": (
        "in place",
        lambda r: r.lib.all_to_all(r.send, r.send if r.rank else r.recv, 4, r.f32, r.comm, None),
    ),
}
_HCCL: dict[str, tuple[str, Callable[[Raw], None]]] = {
    "all-to-all counts": ("sends 2", lambda r: r.all_to_all_v([1, 2], [1, 1 + r.rank])),
    "all-to-all self": ("sends itself", lambda r: r.all_to_all_v([1, 1], [2 - r.rank, 1])),
    "batch to self": ("no other rank", lambda r: r.batch(0)),
    "batch item": ("neither send nor receive", lambda r: r.batch(1 - r.rank, 2 - r.rank)),
    "average": ("is no reduction", lambda r: r.all_reduce(op=4)),
    "not reduced": ("cannot be reduced", lambda r: r.all_reduce(dtype=10)),
}  # fmt: skip


def _to(r: Raw, peer: int) -> None:
    r.lib.send(r.send, 4, r.f32, peer, r.comm, None)


def _null(r: Raw) -> None:
    r.lib.all_reduce(None, r.recv, 4, r.f32, SUM, r.comm, None)


def _scenarios(which: str) -> dict[str, tuple[str, Callable[[Raw], None]]]:
    return {**_BOTH, **(_NCCL if which == "nccl" else _HCCL)}


def names(which: str) -> list[str]:
    """All misuses of this library."""
    return list(_scenarios(which))


def expected(name: str) -> str:
    """What both ranks' text must hold."""
    return {**_BOTH, **_NCCL, **_HCCL}[name][0]


def raw(which: str, path: str, wanted: list[str]) -> list[tuple[str, int]]:
    """For each misuse, this rank's error and the communicator's state afterwards."""
    from torch.distributed import get_rank

    results = []
    for name in wanted:
        r = Raw(which, path, get_rank())
        text = text_of(lambda: _scenarios(which)[name][1](r))  # noqa: B023
        results.append((text, r.lib.comm_get_async_error(r.comm)))
        torch.distributed.barrier(group=cpu_group())  # nobody destroys what another still asks
        r.lib.comm_destroy(r.comm)
    return results


def handles(which: str, path: str) -> list[tuple[str, str, str]]:
    """(what, a piece of the text that it must give, the text) for handles and ids that are not what they should be."""
    from torch.distributed import get_rank

    rank = get_rank()
    r = Raw(which, path, rank)
    lines = []
    if which == "nccl":
        lines.append(("group end", "without ncclGroupStart", text_of(r.lib.group_end)))
        aborted = Raw(which, path, rank)
        aborted.lib.comm_abort(aborted.comm)
        lines.append(("aborted", "was aborted before the call", text_of(aborted.all_reduce)))
        lines.append(
            ("aborted twice", "was aborted before the call", text_of(lambda: aborted.lib.comm_abort(aborted.comm)))
        )
    r.lib.comm_destroy(r.comm)
    lines.append(("destroyed", "was destroyed before the call", text_of(r.all_reduce)))
    lines.append(("destroyed twice", "was destroyed before the call", text_of(lambda: r.lib.comm_destroy(r.comm))))
    r.comm = r.send
    lines.append(("foreign", "is not a communicator", text_of(r.all_reduce)))
    foreign = b"x" * 127 + b"\0" if which == "nccl" else b"x" * 4107 + b"z"
    lines.append(("id", "not made by this library", text_of(lambda: r.init(foreign, 2, rank))))
    one = r.new_id()
    lines.append(("sizes", "there are", text_of(lambda: r.init(one, 2 + rank, rank))))
    two = r.new_id()
    lines.append(("twice", "came twice", text_of(lambda: r.init(two, 2, 0))))
    lines.append(("rank", "out of range", text_of(lambda: r.init(two, 2, 2))))
    return lines  # fmt: skip
