"""A communicator over HCCL's C interface, for Ascend NPUs. Tested against a double of the library, never on an NPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fvops.checks import where
from fvops.device_communicators.library_bootstrap import StatelessGroup
from fvops.device_communicators.library_communicator import Exchange, LibraryCommunicator
from fvops.device_communicators.library_watchdog import bounded
from fvops.device_communicators.pyhccl_wrapper import DTYPES, REDUCTIONS, HCCLLibrary, Transfer

__all__ = ["PyHcclCommunicator"]

# What HCCL's documentation lets be reduced on Atlas A2 and A3, and the exceptions for products.
_REDUCED = (
    torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.bfloat16
)  # fmt: skip
_NO_PRODUCT = (torch.int16, torch.bfloat16)


class PyHcclCommunicator(LibraryCommunicator):
    """Collectives over HCCL on the caller's stream; see `LibraryCommunicator` and `LibraryConnection`.

    HCCL has no average: a sum is divided. It has no group: sends and receives between `group_start` and `group_end`
    become one batch, those with oneself a copy; other calls inside are issued at once. It has no abort: destroying the
    communicator takes that part.

    Attributes:
        hccl: the `HCCLLibrary`.
    """

    NAME = "pyhccl"
    BACKEND = "hccl"
    DEVICE_TYPE = "npu"
    DTYPES = DTYPES
    ID_BYTES = 4108
    FINE = (0,)
    HAS_AVG = False

    def __init__(
        self,
        group: dist.ProcessGroup | StatelessGroup | None = None,
        device: int | str | torch.device | None = None,
        library_path: str | None = None,
        *,
        allow_single_rank: bool = False,
        group_name: str | None = None,
        timeout_s: float | None = None,
        lazy: bool = False,
    ) -> None:
        self._batch: list[tuple[Tensor, int, bool]] = []  # tensor, peer, is it a send
        super().__init__(
            group,
            device,
            library_path,
            allow_single_rank=allow_single_rank,
            group_name=group_name,
            timeout_s=timeout_s,
            lazy=lazy,
        )

    @property
    def hccl(self) -> HCCLLibrary:
        """The library; AttributeError when none was loaded."""
        return self.library

    def group_start(self) -> None:
        """Collect sends and receives until `group_end`; nests."""
        self._prepare("group_start", None)
        self._group_depth += 1

    def group_end(self) -> None:
        """Issue the sends and receives since `group_start`, all in progress together.

        Raises:
            RuntimeError: no group is open.
            ValueError: sends to and receives from oneself do not pair up, or the group used two streams.
        """
        op = self._check_group_open()
        if self._group_depth > 1:
            self._group_depth -= 1
            return
        batch, streams = self._batch, list(self._group_streams)
        self._leave_groups()
        if len(streams) > 1:
            raise ValueError(
                f"{where(op, self.group_name)}: one batch is issued to one stream, the group used {streams}"
            )
        stream = streams[0] if streams else None
        self._copy_to_self(op, stream, batch)
        transfers = [
            Transfer(sending, tensor.data_ptr(), tensor.numel() * self._wire(tensor)[1], self._wire(tensor)[0], peer)
            for tensor, peer, sending in batch
            if peer != self.rank
        ]
        if transfers:
            self._run(op, stream, self.hccl.batch_send_recv, transfers)

    def _copy_to_self(self, op: str, stream: Any, batch: Sequence[tuple[Tensor, int, bool]]) -> None:
        sends, recvs = ([t for t, peer, s in batch if peer == self.rank and s is sending] for sending in (True, False))
        if [(t.numel(), t.dtype) for t in sends] != [(t.numel(), t.dtype) for t in recvs]:
            raise ValueError(
                f"{where(op, self.group_name)}: sends to this rank itself do not pair up with receives from it: "
                f"{[(tuple(t.shape), t.dtype) for t in sends]} and {[(tuple(t.shape), t.dtype) for t in recvs]}"
            )
        with self._streams.use(stream):
            for source, target in zip(sends, recvs, strict=True):
                target.view(-1).copy_(source.view(-1))

    def _leave_groups(self) -> None:
        self._batch = []
        super()._leave_groups()

    def _load(self, path: str | None) -> HCCLLibrary:
        return HCCLLibrary(path)

    def _make_id(self) -> bytes:
        return self.hccl.get_root_info()

    def _connect(self, unique_id: bytes, deadline_s: float) -> int | None:
        """HCCL's initialisation blocks and cannot be ended from outside: a late one is left to its own time limit."""
        handles: list[int] = []
        given_up = threading.Event()

        def connect() -> None:
            with self._streams.use_device():  # the current device is a thread's own
                comm = self.hccl.comm_init_root_info(self.world_size, unique_id, self.rank)
            handles.append(comm)
            if given_up.is_set():
                self.hccl.comm_destroy(comm)

        if bounded(f"start of {self.group_name}", connect, deadline_s):
            return handles[0]
        given_up.set()
        return None

    def _end_now(self, comm: int) -> None:
        self.hccl.comm_destroy(comm)

    def _issue(self, function: Callable[..., Any], stream: int | None, *args: Any) -> None:
        function(*args, self.comm, stream)

    def _finish(self) -> None:
        comm = self.comm
        if comm is not None:
            self.hccl.comm_destroy(comm)
            self.comm = None

    def _native(self, dtype: torch.dtype, reduce_op: str) -> tuple[int, int] | None:
        if dtype == torch.bool and reduce_op in ("max", "min", "product"):
            dtype = torch.int8  # bytes 0 and 1; HCCL does not reduce uint8
        if dtype not in _REDUCED or (reduce_op == "product" and dtype in _NO_PRODUCT):
            return None
        if reduce_op == "avg":
            return (DTYPES[dtype], REDUCTIONS["sum"]) if dtype.is_floating_point else None
        return (DTYPES[dtype], REDUCTIONS[reduce_op]) if reduce_op in REDUCTIONS else None

    def _broadcast(self, op: str, stream: Any, buffer: int, count: int, dtype: int, src: int) -> None:
        self._run(op, stream, self.hccl.broadcast, buffer, count, dtype, src)

    def _transfer(self, op: str, stream: Any, tensor: Tensor, peer: int, *, sending: bool) -> None:
        if self._group_depth:
            self._batch.append((tensor, peer, sending))
            if stream is not None and stream not in self._group_streams:
                self._group_streams.append(stream)
            return
        dtype, factor = self._wire(tensor)
        function = self.hccl.send if sending else self.hccl.recv
        self._run(op, stream, function, tensor.data_ptr(), tensor.numel() * factor, dtype, peer)

    def _all_to_all(self, op: str, stream: Any, parts: Exchange, count: int) -> None:
        self._run(op, stream, self.hccl.all_to_all, parts.send, parts.recv, count, parts.dtype)

    def _all_to_all_v(self, op: str, stream: Any, parts: Exchange) -> None:
        counts = (parts.send, parts.send_counts, parts.recv, parts.recv_counts)
        self._run(op, stream, self.hccl.all_to_all_v, *counts, parts.dtype)
