"""The life of a communicator over a collective library: how it starts, hands calls over, fails and ends.

`library_communicator` adds the collectives; `pynccl` and `pyhccl` say what differs between the two libraries.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from fvops import envs, platforms
from fvops.checks import where
from fvops.device_communicators.library_arguments import check_buffer
from fvops.device_communicators.library_bootstrap import Bootstrap, StatelessGroup
from fvops.device_communicators.library_loading import CommunicationLibrary, LibraryError, LibraryNotFoundError
from fvops.device_communicators.library_streams import Streams, let_thread_query_during_capture
from fvops.device_communicators.library_watchdog import BrokenCommunicatorError, Watchdog, bounded
from fvops.logger import init_logger

__all__ = ["LibraryConnection"]

logger = init_logger(__name__)


class LibraryConnection(ABC):
    """One communicator. Peers are places in `group`; tensors are contiguous and on `device`.

    With one rank (unless `allow_single_rank`), or where any rank has no library, it is disabled on every rank: it can
    be asked and destroyed, and its calls raise RuntimeError. A call that fails or outlasts its
    deadline aborts the communicator; from then on every call raises, and `abort_reason` says why.

    Args:
        group: a ProcessGroup that carries CPU tensors, None for the default one, or a `StatelessGroup`.
        device: where the tensors live: an index, a torch.device or its name; None is the local rank's.
        library_path: the library to load; default: see `library_loading`.
        allow_single_rank: also communicate with oneself.
        group_name: the group's name in messages; default: the process group's own.
        timeout_s: deadline of each call and of the start, seconds; default ``FVOPS_TIMEOUT_S``, read here.
        lazy: settle here only whether the group has the library, and connect at the first call, which every rank must
            make: a connection costs over half a gigabyte of a GPU's memory, and not every group is used.

    Attributes:
        rank, world_size, group, device: as above.
        available, disabled: can it be used?
        comm: the library's handle, None when there is none or it was aborted.
        unique_id: the bytes that the ranks started from.

    Raises:
        ValueError, TypeError: a group or device that cannot serve.
        RuntimeError: the exchange failed, or not all ranks came within the deadline.
    """

    NAME: ClassVar[str]  # of the module, for messages
    BACKEND: ClassVar[str]  # torch.distributed's name of the library
    DEVICE_TYPE: ClassVar[str]
    ID_BYTES: ClassVar[int]
    FINE: ClassVar[tuple[int, ...]]  # states of a communicator that are no errors

    library: Any  # the NCCLLibrary or HCCLLibrary, once it is loaded

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
        bootstrap = Bootstrap(group, self.BACKEND, group_name)
        self.group = bootstrap.group
        self.rank, self.world_size, self.group_name = bootstrap.rank, bootstrap.world_size, bootstrap.name
        self.device = self._device(device)
        self.comm: int | None = None
        self.unique_id: bytes | None = None
        self.available, self.disabled = False, True
        self._why_disabled = "it has one rank"
        self._not_connected: Bootstrap | None = None
        self._streams = Streams(self.device)
        # Held while the library is asked about the communicator, so that nobody ends it in that moment.
        self._asking = threading.Lock()
        self._group_depth = 0
        self._group_keeps: list[Tensor] = []
        self._group_streams: list[Any] = []
        self._watchdog = Watchdog(
            self.group_name,
            envs.FVOPS_TIMEOUT_S if timeout_s is None else timeout_s,
            abort=self._abort,
            async_error=self._async_error,
            busy=lambda: self._group_depth > 0,
            prepare=let_thread_query_during_capture if self.device.type == "cuda" else lambda: True,
        )
        if self.world_size == 1 and not allow_single_rank:
            return
        if not self._all_have_library(bootstrap, library_path):
            return
        self.available, self.disabled = True, False
        self._not_connected = bootstrap
        if not lazy:
            self._connect_now(bootstrap)

    @abstractmethod
    def _load(self, path: str | None) -> CommunicationLibrary: ...

    @abstractmethod
    def _make_id(self) -> bytes: ...

    @abstractmethod
    def _connect(self, unique_id: bytes, deadline_s: float) -> int | None:
        """The library's communicator; None when not all ranks came within the deadline."""

    @abstractmethod
    def _end_now(self, comm: int) -> None:
        """End the communicator and whatever waits in it."""

    @abstractmethod
    def _issue(self, function: Callable[..., Any], stream: int | None, *args: Any) -> None:
        """``function(*args, comm, stream)``, until the library has taken it."""

    @abstractmethod
    def _finish(self) -> None:
        """Flush and free the communicator; may wait."""

    def _abort(self) -> None:
        """End the communicator at once, from any thread; nothing when there is none."""
        with self._asking:
            comm, self.comm = self.comm, None
        if comm is not None:
            try:
                self._end_now(comm)
            except LibraryError as error:
                logger.warning("aborting the communicator of group %r: %s", self.group_name, error)

    def _async_error(self) -> str | None:
        """What the library says of the communicator outside a call, None while all is well."""
        with self._asking:
            if self.comm is None:
                return None
            code = self.library.comm_get_async_error(self.comm)
            return None if code in self.FINE else self.library.describe(code)

    def _all_have_library(self, bootstrap: Bootstrap, path: str | None) -> bool:
        failure = ""
        try:
            self.library = self._load(path)
        except LibraryNotFoundError as error:
            failure = str(error) or "not found"
        failures = bootstrap.gather(failure, "who has the library")
        lacking = [f"rank {rank}: {text}" for rank, text in enumerate(failures) if text]
        if lacking:
            self._why_disabled = f"not every rank has the library ({'; '.join(lacking)})"
            logger.warning_once("%s is disabled: %s", type(self).__name__, self._why_disabled)
        return not lacking

    def _connect_now(self, bootstrap: Bootstrap) -> None:
        self._not_connected = None
        try:
            self._start(bootstrap)
        except RuntimeError as error:
            self.available, self.disabled, self._why_disabled = False, True, str(error)
            raise

    def _start(self, bootstrap: Bootstrap) -> None:
        failure, unique_id = "", b""
        with self._streams.use_device():
            if self.rank == 0:
                try:
                    unique_id = self._make_id()
                except LibraryError as error:  # the others wait for the id: tell them instead
                    failure = str(error)
            failure = bootstrap.gather(failure, "the state of rank 0")[0]
            if failure:
                raise RuntimeError(f"{self.NAME} on group {self.group_name!r}: rank 0 has no unique id: {failure}")
            unique_id = bootstrap.broadcast(unique_id or bytes(self.ID_BYTES), 0, "the unique id")
            deadline_s = self._watchdog.deadline_s
            try:
                self.comm = self._connect(unique_id, deadline_s)
            except LibraryError as error:
                raise RuntimeError(
                    f"{self.NAME}: initialisation of rank {self.rank} of {self.world_size} on group "
                    f"{self.group_name!r} failed: {error}"
                ) from error
            if self.comm is None:
                raise RuntimeError(
                    f"{self.NAME}: initialisation of rank {self.rank} of {self.world_size} on group "
                    f"{self.group_name!r}: not all ranks came within {deadline_s:g} s"
                )
        self.unique_id = unique_id

    @property
    def abort_reason(self) -> str | None:
        """Why the communicator was aborted, None while it was not."""
        return self._watchdog.reason

    @property
    def why_disabled(self) -> str:
        """Why the communicator cannot be used, where it cannot."""
        return self._why_disabled

    @property
    def broken(self) -> bool:
        """Was it aborted?"""
        return self._watchdog.reason is not None

    def abort(self, reason: str) -> None:
        """Break the communicator: every later call raises with `reason`. Safe to call twice."""
        self._watchdog.break_with(reason)

    def destroy(self, deadline_s: float | None = None) -> None:
        """Flush and free the communicator; after `deadline_s` seconds (default: its deadline) it is aborted instead.

        Harmless when repeated, on a disabled communicator, and after an abort. Never raises for what the library
        says: that is logged.

        Raises:
            RuntimeError: between `group_start` and `group_end`.
        """
        if self._group_depth:
            raise RuntimeError(
                f"{self.NAME}.destroy on group {self.group_name!r}: a group is open; call group_end first"
            )
        if not self.disabled:
            self._why_disabled = "it was destroyed"
        self.disabled, self.available = True, False
        self._watchdog.stop()
        if self.comm is None:
            return
        limit = self._watchdog.deadline_s if deadline_s is None else deadline_s
        # Broken, but its thread has not come to aborting it; who takes the handle first does.
        end = self._abort if self.broken else self._finish
        try:
            if not bounded(f"end of {self.group_name}", end, limit):
                self._watchdog.break_with(
                    f"{self.NAME}.destroy on group {self.group_name!r} was not done within {limit:g} s"
                )
        except LibraryError as error:
            self._watchdog.break_with(f"{self.NAME}.destroy on group {self.group_name!r} failed: {error}")

    # What all methods go through

    def _run(self, op: str, stream: Any, function: Callable[..., Any], *args: Any) -> None:
        """Hand one call to the library, under the watchdog; `args` are those before the communicator and the stream."""
        self._watched(op, self._issue, function, self._streams.handle(stream), *args)
        if stream is not None and stream not in self._group_streams:
            self._group_streams.append(stream)
        if self._group_depth == 0:
            self._follow(op)

    def _watched(self, op: str, function: Callable[..., Any], *args: Any) -> None:
        try:
            self._watchdog.run(op, self._in_library, function, *args)
        except BrokenCommunicatorError:
            self._leave_groups()
            raise

    def _in_library(self, function: Callable[..., Any], *args: Any) -> None:
        error = self._async_error()
        if error is not None:
            raise LibraryError(f"an earlier {self.BACKEND} call", -1, error)
        try:
            function(*args)
        except LibraryError:
            # Before the communicator is aborted: an open group still refers to it.
            self._leave_groups()
            raise

    def _follow(self, op: str) -> None:
        """Have the watchdog see through, on the device, what was issued since the last time."""
        for stream in self._group_streams:
            event = self._streams.event(stream)
            if event is not None:
                self._watchdog.follow(op, event)
        self._group_streams.clear()
        self._group_keeps.clear()

    def _leave_groups(self) -> None:
        """Forget open groups, after a failure."""
        self._group_depth = 0
        self._group_keeps.clear()
        self._group_streams.clear()

    def _prepare(self, op: str, stream: Any, **tensors: Tensor) -> tuple[str, Any]:
        """The op's name for messages and the stream; refuses what no call may be made with."""
        op = f"{self.NAME}.{op}"
        if self.disabled:
            raise RuntimeError(f"{where(op, self.group_name)}: the communicator is disabled: {self._why_disabled}")
        if self._not_connected is not None:
            self._connect_now(self._not_connected)
        self._refuse_if_broken(op)
        for what, tensor in tensors.items():
            check_buffer(op, self.group_name, what, tensor, self.device)
        stream = self._streams.resolve(op, self.group_name, stream)
        self._streams.keep(stream, *tensors.values())
        if self._group_depth:
            self._group_keeps.extend(tensors.values())  # their addresses are used when the group ends
        return op, stream

    def _refuse_if_broken(self, op: str) -> None:
        if self._watchdog.reason is not None:
            self._leave_groups()  # the abort waits for an open group
            self._watchdog.raise_if_broken(op)

    def _device(self, device: int | str | torch.device | None) -> torch.device:
        if device is None:
            found = platforms.local_torch_device(envs.LOCAL_RANK)
        elif isinstance(device, int):
            found = torch.device(self.DEVICE_TYPE, device)
        else:
            found = torch.device(device)
        if found.type not in (self.DEVICE_TYPE, "cpu"):
            raise ValueError(f"{self.NAME} communicates on {self.DEVICE_TYPE} devices, got {found}")
        if found.type != "cpu" and found.index is None:
            found = torch.device(found.type, getattr(torch, found.type).current_device())
        return found
