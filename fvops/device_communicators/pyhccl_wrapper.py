"""ctypes bindings of HCCL, Huawei's library for Ascend NPUs: each method is one C function, arguments in the C order.

Unlike NCCL's, counts are unsigned 64-bit, ranks unsigned 32-bit, the root info travels by pointer, and there is neither
a group call nor an abort: `batch_send_recv` issues several transfers at once, and destroying is the only way to end.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_int, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fvops.device_communicators.library_loading import CommunicationLibrary, LibraryError

__all__ = ["HCCLLibrary", "RootInfo", "SendRecvItem", "Transfer"]

REDUCTIONS = {"sum": 0, "product": 1, "max": 2, "min": 3}

DTYPES = {
    torch.int8: 0,
    torch.int16: 1,
    torch.int32: 2,
    torch.float16: 3,
    torch.float32: 4,
    torch.int64: 5,
    torch.uint64: 6,
    torch.uint8: 7,
    torch.uint16: 8,
    torch.uint32: 9,
    torch.float64: 10,
    torch.bfloat16: 11,
}

_INTERNAL_ERROR = 4


class RootInfo(ctypes.Structure):
    """HcclRootInfo: 4108 bytes, handed over by pointer."""

    _fields_: ClassVar = [("internal", ctypes.c_char * 4108)]


class SendRecvItem(ctypes.Structure):
    """HcclSendRecvItem: one transfer of a batch; kind 0 sends, 1 receives."""

    _fields_: ClassVar = [
        ("kind", c_int),
        ("buffer", c_void_p),
        ("count", c_uint64),
        ("dtype", c_int),
        ("remote_rank", c_uint32),
    ]


@dataclass(frozen=True)
class Transfer:
    """One transfer of `HCCLLibrary.batch_send_recv`; the buffer is an address, the count in elements."""

    sending: bool
    buffer: int
    count: int
    dtype: int
    peer: int


_COMM = c_void_p
_STREAM = c_void_p
_COUNTS = POINTER(c_uint64)


class HCCLLibrary(CommunicationLibrary):
    """HCCL's functions. Buffers, communicators and streams are addresses; counts are elements.

    Every result but success raises `LibraryError`.

    Raises:
        LibraryNotFoundError: there is no libhccl, or one without a function that is needed.
    """

    VARIABLE = "FVOPS_HCCL_LIBRARY"
    SONAME = "libhccl.so"
    WHEEL = ()
    FUNCTIONS: ClassVar[Mapping[str, Sequence[Any]]] = {
        "HcclGetRootInfo": (POINTER(RootInfo),),
        "HcclCommInitRootInfo": (c_uint32, POINTER(RootInfo), c_uint32, POINTER(_COMM)),
        "HcclAllReduce": (c_void_p, c_void_p, c_uint64, c_int, c_int, _COMM, _STREAM),
        "HcclReduce": (c_void_p, c_void_p, c_uint64, c_int, c_int, c_uint32, _COMM, _STREAM),
        "HcclAllGather": (c_void_p, c_void_p, c_uint64, c_int, _COMM, _STREAM),
        "HcclReduceScatter": (c_void_p, c_void_p, c_uint64, c_int, c_int, _COMM, _STREAM),
        "HcclBroadcast": (c_void_p, c_uint64, c_int, c_uint32, _COMM, _STREAM),
        "HcclSend": (c_void_p, c_uint64, c_int, c_uint32, _COMM, _STREAM),
        "HcclRecv": (c_void_p, c_uint64, c_int, c_uint32, _COMM, _STREAM),
        "HcclAlltoAll": (c_void_p, c_uint64, c_int, c_void_p, c_uint64, c_int, _COMM, _STREAM),
        "HcclAlltoAllV": (c_void_p, _COUNTS, _COUNTS, c_int, c_void_p, _COUNTS, _COUNTS, c_int, _COMM, _STREAM),
        "HcclBatchSendRecv": (POINTER(SendRecvItem), c_uint32, _COMM, _STREAM),
        "HcclGetRankSize": (_COMM, POINTER(c_uint32)),
        "HcclGetRankId": (_COMM, POINTER(c_uint32)),
        "HcclGetCommAsyncError": (_COMM, POINTER(c_int)),
        "HcclCommDestroy": (_COMM,),
    }
    OPTIONAL: ClassVar[Mapping[str, Sequence[Any]]] = {}
    TEXTS: ClassVar[Mapping[str, Sequence[Any]]] = {"HcclGetErrorString": (c_int,)}

    def get_error_string(self, code: int) -> str:
        """The name of a result."""
        return self._text("HcclGetErrorString", code)

    def get_root_info(self) -> bytes:
        """4108 bytes that one rank makes and all ranks of a new communicator hand to its initialisation."""
        info = RootInfo()
        self._call("HcclGetRootInfo", ctypes.byref(info))
        return bytes(info)

    def comm_init_root_info(self, world_size: int, root_info: bytes, rank: int) -> int:
        """A communicator, once all ranks have come; the library's ``HCCL_CONNECT_TIMEOUT`` (s) bounds the wait."""
        if len(root_info) != ctypes.sizeof(RootInfo):
            raise ValueError(f"an HCCL root info has {ctypes.sizeof(RootInfo)} bytes, got {len(root_info)}")
        comm = _COMM()
        info = RootInfo.from_buffer_copy(root_info)
        self._call("HcclCommInitRootInfo", world_size, ctypes.byref(info), rank, ctypes.byref(comm))
        if not comm.value:
            raise LibraryError("HcclCommInitRootInfo", _INTERNAL_ERROR, "it returned no communicator")
        return comm.value

    def get_rank_size(self, comm: int) -> int:
        """How many ranks the communicator has."""
        size = c_uint32()
        self._call("HcclGetRankSize", comm, ctypes.byref(size))
        return size.value

    def get_rank_id(self, comm: int) -> int:
        """This process's rank in the communicator."""
        rank = c_uint32()
        self._call("HcclGetRankId", comm, ctypes.byref(rank))
        return rank.value

    def comm_get_async_error(self, comm: int) -> int:
        """0, or the code of an error that happened outside a call."""
        code = c_int()
        self._call("HcclGetCommAsyncError", comm, ctypes.byref(code))
        return code.value

    def comm_destroy(self, comm: int) -> None:
        """Free the communicator."""
        self._call("HcclCommDestroy", comm)

    def all_reduce(self, send: int, recv: int, count: int, dtype: int, op: int, comm: int, stream: int | None) -> None:
        """`recv` is the reduction of the ranks' `send`, `count` elements each."""
        self._call("HcclAllReduce", send, recv, count, dtype, op, comm, stream)

    def reduce(
        self, send: int, recv: int, count: int, dtype: int, op: int, root: int, comm: int, stream: int | None
    ) -> None:
        """`recv` of `root` is the reduction of the ranks' `send`."""
        self._call("HcclReduce", send, recv, count, dtype, op, root, comm, stream)

    def all_gather(self, send: int, recv: int, count: int, dtype: int, comm: int, stream: int | None) -> None:
        """`recv` is the ranks' `send` one after another; `count` elements from each."""
        self._call("HcclAllGather", send, recv, count, dtype, comm, stream)

    def reduce_scatter(
        self, send: int, recv: int, count: int, dtype: int, op: int, comm: int, stream: int | None
    ) -> None:
        """`recv` is this rank's part, `count` elements, of the reduction of the ranks' `send`."""
        self._call("HcclReduceScatter", send, recv, count, dtype, op, comm, stream)

    def broadcast(self, buffer: int, count: int, dtype: int, root: int, comm: int, stream: int | None) -> None:
        """`buffer` of `root` on every rank, in place."""
        self._call("HcclBroadcast", buffer, count, dtype, root, comm, stream)

    def send(self, buffer: int, count: int, dtype: int, peer: int, comm: int, stream: int | None) -> None:
        """Send to `peer`."""
        self._call("HcclSend", buffer, count, dtype, peer, comm, stream)

    def recv(self, buffer: int, count: int, dtype: int, peer: int, comm: int, stream: int | None) -> None:
        """Receive from `peer`."""
        self._call("HcclRecv", buffer, count, dtype, peer, comm, stream)

    def all_to_all(self, send: int, recv: int, count: int, dtype: int, comm: int, stream: int | None) -> None:
        """Part j of `send` goes to rank j, `count` elements each."""
        self._call("HcclAlltoAll", send, count, dtype, recv, count, dtype, comm, stream)

    def all_to_all_v(
        self,
        send: int,
        send_counts: Sequence[int],
        recv: int,
        recv_counts: Sequence[int],
        dtype: int,
        comm: int,
        stream: int | None,
    ) -> None:
        """``send_counts[j]`` elements go to rank j, ``recv_counts[j]`` come from it; parts lie one after another."""
        sends = _counts(send_counts), _counts(_offsets(send_counts))
        recvs = _counts(recv_counts), _counts(_offsets(recv_counts))
        self._call("HcclAlltoAllV", send, *sends, dtype, recv, *recvs, dtype, comm, stream)

    def batch_send_recv(self, transfers: Sequence[Transfer], comm: int, stream: int | None) -> None:
        """All `transfers`, in progress together; none may be with this rank itself."""
        items = (SendRecvItem * len(transfers))(
            *(SendRecvItem(int(not t.sending), t.buffer, t.count, t.dtype, t.peer) for t in transfers)
        )
        self._call("HcclBatchSendRecv", items, len(transfers), comm, stream)

    def describe(self, code: int) -> str:
        """The name of a result; HCCL keeps no text of the last error."""
        return self.get_error_string(code)


def _counts(values: Sequence[int]) -> Any:
    return (c_uint64 * len(values))(*values)


def _offsets(counts: Sequence[int]) -> list[int]:
    return [sum(counts[:place]) for place in range(len(counts))]
