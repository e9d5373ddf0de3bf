"""A communicator over NCCL's C interface."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fvops.device_communicators.library_communicator import Exchange, LibraryCommunicator
from fvops.device_communicators.library_loading import LibraryError
from fvops.device_communicators.library_watchdog import bounded
from fvops.device_communicators.pynccl_wrapper import DTYPES, IN_PROGRESS, REDUCTIONS, NCCLLibrary
from fvops.logger import init_logger

__all__ = ["PyNcclCommunicator"]

logger = init_logger(__name__)

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FLOAT8_SINCE = 22400
_FLOAT8_CAPABILITY = (9, 0)

# How long to rest between two looks at an unfinished call, in seconds.
_POLL_S = 0.0005


class PyNcclCommunicator(LibraryCommunicator):
    """Collectives over NCCL on the caller's stream; see `LibraryCommunicator` and `LibraryConnection`.

    NCCL is always told not to block, since only then can a communicator be aborted at any time: a call that it leaves
    unfinished is polled here until NCCL has taken it.

    Attributes:
        nccl: the `NCCLLibrary`.
    """

    NAME = "pynccl"
    BACKEND = "nccl"
    DEVICE_TYPE = "cuda"
    DTYPES = DTYPES
    ID_BYTES = 128
    FINE = (0, IN_PROGRESS)
    HAS_AVG = True

    @property
    def nccl(self) -> NCCLLibrary:
        """The library; AttributeError when none was loaded."""
        return self.library

    def group_start(self) -> None:
        """Collect calls until `group_end`; nests. Every method may be used inside."""
        name, _ = self._prepare("group_start", None)
        self._watched(name, self.nccl.group_start)
        self._group_depth += 1

    def group_end(self) -> None:
        """Issue what was collected since `group_start`, all in progress together.

        Raises:
            RuntimeError: no group is open.
        """
        name = self._check_group_open()
        self._watched(name, self._end_group)
        if self._group_depth == 0:
            self._follow(name)

    def _end_group(self) -> None:
        self._group_depth -= 1  # NCCL's own depth goes down too, whatever it returns
        if self.nccl.group_end() and self._group_depth == 0:
            self._settle()

    def _leave_groups(self) -> None:
        while self._group_depth:
            self._group_depth -= 1
            if self.comm is not None:
                with contextlib.suppress(LibraryError):  # the failure that brought us here, once more
                    self.nccl.group_end()
        super()._leave_groups()

    def _load(self, path: str | None) -> NCCLLibrary:
        return NCCLLibrary(path)

    def _make_id(self) -> bytes:
        return self.nccl.get_unique_id()

    def _connect(self, unique_id: bytes, deadline_s: float) -> int | None:
        until = time.monotonic() + deadline_s
        comm, unfinished = self.nccl.comm_init_rank_config(self.world_size, unique_id, self.rank, blocking=False)
        while unfinished:
            code = self.nccl.comm_get_async_error(comm)
            if code == 0:
                break
            if code != IN_PROGRESS or time.monotonic() > until:
                text = self.nccl.describe(code)
                self._abort_bounded(comm, deadline_s)
                if code != IN_PROGRESS:
                    raise LibraryError("ncclCommInitRankConfig", code, text)
                return None
            time.sleep(_POLL_S)
        return comm

    def _abort_bounded(self, comm: int, deadline_s: float) -> None:
        if not bounded(f"abort of {self.group_name}", lambda: self.nccl.comm_abort(comm), deadline_s):
            logger.warning("ncclCommAbort on group %r did not return within %g s", self.group_name, deadline_s)

    def _end_now(self, comm: int) -> None:
        self.nccl.comm_abort(comm)

    def _issue(self, function: Callable[..., Any], stream: int | None, *args: Any) -> None:
        if function(*args, self.comm, stream) and self._group_depth == 0:
            self._settle()

    def _settle(self) -> None:
        """Wait until NCCL has taken an unfinished call; the watchdog bounds this by aborting."""
        while True:
            with self._asking:
                if self.comm is None:
                    raise LibraryError("an unfinished nccl call", IN_PROGRESS, "aborted")
                code = self.nccl.comm_get_async_error(self.comm)
                text = "" if code in self.FINE else self.nccl.describe(code)
            if code == 0:
                return
            if text:
                raise LibraryError("an unfinished nccl call", code, text)
            time.sleep(_POLL_S)

    def _finish(self) -> None:
        comm = self.comm
        if comm is None:
            return
        if self.nccl.has("ncclCommFinalize") and self.nccl.comm_finalize(comm):
            self._settle()
        self.nccl.comm_destroy(comm)
        self.comm = None

    def _native(self, dtype: torch.dtype, reduce_op: str) -> tuple[int, int] | None:
        if dtype == torch.bool and reduce_op in ("max", "min", "product"):
            dtype = torch.uint8
        if dtype not in DTYPES or reduce_op not in REDUCTIONS:
            return None
        if dtype in _FLOAT8 and not self._has_float8():
            return None
        return DTYPES[dtype], REDUCTIONS[reduce_op]

    def _has_float8(self) -> bool:
        if self.nccl.get_version() < _FLOAT8_SINCE:
            return False
        return self.device.type != "cuda" or torch.cuda.get_device_capability(self.device) >= _FLOAT8_CAPABILITY

    def _broadcast(self, op: str, stream: Any, buffer: int, count: int, dtype: int, src: int) -> None:
        self._run(op, stream, self.nccl.broadcast, buffer, buffer, count, dtype, src)

    def _transfer(self, op: str, stream: Any, tensor: Tensor, peer: int, *, sending: bool) -> None:
        dtype, factor = self._wire(tensor)
        function = self.nccl.send if sending else self.nccl.recv
        self._run(op, stream, function, tensor.data_ptr(), tensor.numel() * factor, dtype, peer)

    def _all_to_all(self, op: str, stream: Any, parts: Exchange, count: int) -> None:
        if self.nccl.has("ncclAlltoAll") and not self._group_depth:
            self._run(op, stream, self.nccl.all_to_all, parts.send, parts.recv, count, parts.dtype)
        else:
            self._all_to_all_v(op, stream, parts)

    def _all_to_all_v(self, op: str, stream: Any, parts: Exchange) -> None:
        def exchange(comm: int, handle: int | None) -> bool:
            self.nccl.group_start()
            self._group_depth += 1
            to, at = parts.send, parts.recv
            for peer, (sent, received) in enumerate(zip(parts.send_counts, parts.recv_counts, strict=True)):
                self.nccl.send(to, sent, parts.dtype, peer, comm, handle)
                self.nccl.recv(at, received, parts.dtype, peer, comm, handle)
                to += sent * parts.width
                at += received * parts.width
            self._group_depth -= 1
            return self.nccl.group_end()

        self._run(op, stream, exchange)
