"""ctypes bindings of NCCL: each method is one C function, with its arguments in the C order.

ctypes releases the GIL during a call, so that another thread can abort a communicator whose call blocks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_int, c_size_t, c_void_p
from typing import Any, ClassVar

import torch

from fvops.device_communicators.library_loading import CommunicationLibrary, LibraryError

__all__ = ["IN_PROGRESS", "NCCLLibrary", "UniqueId"]

IN_PROGRESS = 7
_INVALID_ARGUMENT = 4

# The reductions by fvops' names.
REDUCTIONS = {"sum": 0, "product": 1, "max": 2, "min": 3, "avg": 4}

DTYPES = {
    torch.int8: 0,
    torch.uint8: 1,
    torch.int32: 2,
    torch.uint32: 3,
    torch.int64: 4,
    torch.uint64: 5,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
    torch.float8_e4m3fn: 10,
    torch.float8_e5m2: 11,
}


class UniqueId(ctypes.Structure):
    """ncclUniqueId: 128 bytes, handed over by value."""

    _fields_: ClassVar = [("internal", ctypes.c_byte * 128)]


class Config(ctypes.Structure):
    """The part of ncclConfig_t that every version since 2.14 has; NCCL fills up the rest from `size` and `version`."""

    _fields_: ClassVar = [
        ("size", c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", c_int),
    ]

    def __init__(self, blocking: int) -> None:
        super().__init__(ctypes.sizeof(Config), 0xCAFEBEEF, 21400, blocking)


_COMM = c_void_p
_STREAM = c_void_p


class NCCLLibrary(CommunicationLibrary):
    """NCCL's functions. Buffers, communicators and streams are addresses; counts are elements.

    Every result but success raises `LibraryError`. The methods that a nonblocking communicator may leave unfinished
    return True in that case: poll `comm_get_async_error` until it is no longer `IN_PROGRESS`.

    Raises:
        LibraryNotFoundError: there is no NCCL of version 2.14 or newer.
    """

    VARIABLE = "FVOPS_NCCL_LIBRARY"
    SONAME = "libnccl.so.2"
    WHEEL = ("nvidia", "nccl", "lib", "libnccl.so.2")
    FUNCTIONS: ClassVar[Mapping[str, Sequence[Any]]] = {
        "ncclGetVersion": (POINTER(c_int),),
        "ncclGetUniqueId": (POINTER(UniqueId),),
        "ncclCommInitRank": (POINTER(_COMM), c_int, UniqueId, c_int),
        "ncclCommInitRankConfig": (POINTER(_COMM), c_int, UniqueId, c_int, POINTER(Config)),
        "ncclAllReduce": (c_void_p, c_void_p, c_size_t, c_int, c_int, _COMM, _STREAM),
        "ncclReduce": (c_void_p, c_void_p, c_size_t, c_int, c_int, c_int, _COMM, _STREAM),
        "ncclAllGather": (c_void_p, c_void_p, c_size_t, c_int, _COMM, _STREAM),
        "ncclReduceScatter": (c_void_p, c_void_p, c_size_t, c_int, c_int, _COMM, _STREAM),
        "ncclBroadcast": (c_void_p, c_void_p, c_size_t, c_int, c_int, _COMM, _STREAM),
        "ncclSend": (c_void_p, c_size_t, c_int, c_int, _COMM, _STREAM),
        "ncclRecv": (c_void_p, c_size_t, c_int, c_int, _COMM, _STREAM),
        "ncclGroupStart": (),
        "ncclGroupEnd": (),
        "ncclCommCount": (_COMM, POINTER(c_int)),
        "ncclCommUserRank": (_COMM, POINTER(c_int)),
        "ncclCommGetAsyncError": (_COMM, POINTER(c_int)),
        "ncclCommAbort": (_COMM,),
        "ncclCommDestroy": (_COMM,),
    }
    OPTIONAL: ClassVar[Mapping[str, Sequence[Any]]] = {
        "ncclAlltoAll": (c_void_p, c_void_p, c_size_t, c_int, _COMM, _STREAM),  # since 2.28.3
        "ncclCommFinalize": (_COMM,),
    }
    TEXTS: ClassVar[Mapping[str, Sequence[Any]]] = {"ncclGetErrorString": (c_int,), "ncclGetLastError": (_COMM,)}

    def get_version(self) -> int:
        """NCCL's version as one number, 22809 for 2.28.9."""
        version = c_int()
        self._call("ncclGetVersion", ctypes.byref(version))
        return version.value

    def get_error_string(self, code: int) -> str:
        """The name of a result."""
        return self._text("ncclGetErrorString", code)

    def get_last_error(self, comm: int | None = None) -> str:
        """What the last error in this process was about, empty when there was none."""
        return self._text("ncclGetLastError", comm)

    def get_unique_id(self) -> bytes:
        """128 bytes that one rank makes and all ranks of a new communicator hand to its initialisation."""
        unique_id = UniqueId()
        self._call("ncclGetUniqueId", ctypes.byref(unique_id))
        return bytes(unique_id)

    def comm_init_rank(self, world_size: int, unique_id: bytes, rank: int) -> int:
        """A communicator, once all ranks have come; nothing bounds the wait."""
        comm = _COMM()
        self._call("ncclCommInitRank", ctypes.byref(comm), world_size, _unique_id(unique_id), rank)
        return _handle("ncclCommInitRank", comm)

    def comm_init_rank_config(self, world_size: int, unique_id: bytes, rank: int, blocking: bool) -> tuple[int, bool]:
        """A communicator, and whether it is still in progress; with ``blocking=False`` this returns at once."""
        comm = _COMM()
        arguments = (world_size, _unique_id(unique_id), rank, ctypes.byref(Config(int(blocking))))
        unfinished = self._start("ncclCommInitRankConfig", ctypes.byref(comm), *arguments)
        return _handle("ncclCommInitRankConfig", comm), unfinished

    def comm_count(self, comm: int) -> int:
        """How many ranks the communicator has."""
        return self._ask("ncclCommCount", comm)

    def comm_user_rank(self, comm: int) -> int:
        """This process's rank in the communicator."""
        return self._ask("ncclCommUserRank", comm)

    def comm_get_async_error(self, comm: int) -> int:
        """The communicator's state: 0, `IN_PROGRESS`, or the code of an error that happened outside a call."""
        return self._ask("ncclCommGetAsyncError", comm)

    def comm_abort(self, comm: int) -> None:
        """End the communicator and whatever waits in it, from any thread; frees the handle."""
        self._start("ncclCommAbort", comm)

    def comm_finalize(self, comm: int) -> bool:
        """Flush what was issued; only where ``has("ncclCommFinalize")``."""
        return self._start("ncclCommFinalize", comm)

    def comm_destroy(self, comm: int) -> None:
        """Free the communicator."""
        self._call("ncclCommDestroy", comm)

    def all_reduce(self, send: int, recv: int, count: int, dtype: int, op: int, comm: int, stream: int | None) -> bool:
        """`recv` is the reduction of the ranks' `send`, `count` elements each."""
        return self._start("ncclAllReduce", send, recv, count, dtype, op, comm, stream)

    def reduce(
        self, send: int, recv: int, count: int, dtype: int, op: int, root: int, comm: int, stream: int | None
    ) -> bool:
        """`recv` of `root` is the reduction of the ranks' `send`."""
        return self._start("ncclReduce", send, recv, count, dtype, op, root, comm, stream)

    def all_gather(self, send: int, recv: int, count: int, dtype: int, comm: int, stream: int | None) -> bool:
        """`recv` is the ranks' `send` one after another; `count` elements from each."""
        return self._start("ncclAllGather", send, recv, count, dtype, comm, stream)

    def reduce_scatter(
        self, send: int, recv: int, count: int, dtype: int, op: int, comm: int, stream: int | None
    ) -> bool:
        """`recv` is this rank's part, `count` elements, of the reduction of the ranks' `send`."""
        return self._start("ncclReduceScatter", send, recv, count, dtype, op, comm, stream)

    def broadcast(self, send: int, recv: int, count: int, dtype: int, root: int, comm: int, stream: int | None) -> bool:
        """`recv` is `send` of `root`."""
        return self._start("ncclBroadcast", send, recv, count, dtype, root, comm, stream)

    def all_to_all(self, send: int, recv: int, count: int, dtype: int, comm: int, stream: int | None) -> bool:
        """Part j of `send` goes to rank j, `count` elements each; only where ``has("ncclAlltoAll")``, not in place."""
        return self._start("ncclAlltoAll", send, recv, count, dtype, comm, stream)

    def send(self, buffer: int, count: int, dtype: int, peer: int, comm: int, stream: int | None) -> bool:
        """Send to `peer`."""
        return self._start("ncclSend", buffer, count, dtype, peer, comm, stream)

    def recv(self, buffer: int, count: int, dtype: int, peer: int, comm: int, stream: int | None) -> bool:
        """Receive from `peer`."""
        return self._start("ncclRecv", buffer, count, dtype, peer, comm, stream)

    def group_start(self) -> None:
        """Collect this thread's calls until the outermost `group_end`."""
        self._call("ncclGroupStart")

    def group_end(self) -> bool:
        """Issue the group's calls as one."""
        return self._start("ncclGroupEnd")

    def _start(self, function: str, *args: Any) -> bool:
        code = self._functions[function](*args)
        if code == 0:
            return False
        if code == IN_PROGRESS:
            return True
        raise LibraryError(function, code, self.describe(code))

    def _ask(self, function: str, comm: int) -> int:
        value = c_int()
        self._call(function, comm, ctypes.byref(value))
        return value.value

    def describe(self, code: int) -> str:
        """The name of a result, with the text of the last error."""
        # Not the communicator's: the failed one may be gone, and the text is the process's anyway.
        last = self.get_last_error()
        return self.get_error_string(code) + (f" ({last})" if last else "")


def _unique_id(data: bytes) -> UniqueId:
    if len(data) != ctypes.sizeof(UniqueId):
        raise ValueError(f"an NCCL unique id has {ctypes.sizeof(UniqueId)} bytes, got {len(data)}")
    return UniqueId.from_buffer_copy(data)


def _handle(function: str, comm: c_void_p) -> int:
    if not comm.value:
        raise LibraryError(function, _INVALID_ARGUMENT, "it returned no communicator")
    return comm.value
