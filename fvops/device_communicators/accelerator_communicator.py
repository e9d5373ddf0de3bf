"""What the CUDA and NPU communicators share: the choice of the transport, and what holds while a graph is captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.distributed as dist

from fvops import checks, envs
from fvops.agreement import fresh_number
from fvops.device_communicators.asynchronous import Later, SideStream
from fvops.device_communicators.base_device_communicator import DeviceCommunicatorBase
from fvops.device_communicators.flat_transport import FlatTransport
from fvops.device_communicators.lanes import Lanes
from fvops.device_communicators.library_communicator import LibraryCommunicator
from fvops.device_communicators.library_streams import Streams
from fvops.device_communicators.library_transport import LibraryTransport
from fvops.device_communicators.symmetric_buffer import SymmetricBuffer
from fvops.device_communicators.symmetric_transport import SymmetricTransport
from fvops.logger import init_logger
from fvops.stateless_process_group import StatelessProcessGroup

__all__ = ["AcceleratorCommunicator"]

logger = init_logger(__name__)


class AcceleratorCommunicator(DeviceCommunicatorBase):
    """Over the vendor's collective library where every rank of the group has it, else over the torch process group.

    Chosen once, at creation, alike on all ranks; ``FVOPS_TRANSPORT`` can ask for either, and then gets the library for
    a group of one rank too, so that one GPU can exercise it. A connection costs over half a gigabyte of a GPU's memory:
    the library's is made at the group's first collective (`warmup` is one), torch's own at torch's first, which with
    the library never comes.
    Where the ranks can map symmetric memory, exchanges go through that; by name also beside the process group.
    """

    LIBRARY: ClassVar[type[LibraryCommunicator]]
    SYMMETRIC: ClassVar[type[SymmetricBuffer] | None] = None

    def _make_transport(self) -> FlatTransport:
        self._streams = Streams(self.device)
        base = self._two_sided_transport()
        self._symmetric: SymmetricTransport | None = None
        named = envs.FVOPS_TRANSPORT == "symm"
        automatic = envs.FVOPS_TRANSPORT == "auto" and self.library_comm is not None
        if self.SYMMETRIC is None or self.world_size == 1 or not (named or automatic):
            return base
        self._symmetric, words = SymmetricTransport.create(
            base, self.cpu_group, self.unique_name, self._streams, self.SYMMETRIC, self.timeout_s
        )
        if self._symmetric is None and named:
            base.close()
            raise RuntimeError(f"group {self.unique_name!r}: FVOPS_TRANSPORT=symm, but {words}")
        logger.info("group %r: %s", self.unique_name, words)
        self.why_transport += f"; {words}"
        return self._symmetric or base

    def _two_sided_transport(self) -> FlatTransport:
        # Ops that ran outside a capture: what they need for it is there.
        self._warm: set[str] = set()
        self.library_comm: LibraryCommunicator | None = None
        wanted = envs.FVOPS_TRANSPORT
        named = wanted == self.LIBRARY.BACKEND
        # A program that asked for gloo on an accelerator gets gloo, unless it also asks for the library.
        automatic = wanted in ("auto", "symm") and self.world_size > 1 and dist.get_backend(self.device_group) != "gloo"
        if named or automatic:
            options = self._options(self.unique_name)
            comm = self.LIBRARY(self.cpu_group, self.device, **options, allow_single_rank=named, lazy=True)
            if comm.available:
                self.library_comm = comm
                self.why_transport = f"every rank has the library: {comm.library.path}"
                prefix = f"fvops/lanes/{self.unique_name}/{fresh_number(self.cpu_group)}"
                lanes = Lanes(self._pair, prefix, self.rank, self._streams, self.timeout_s)
                return LibraryTransport(comm, self.cpu_group, lanes, self.timeout_s)
            if named:
                raise RuntimeError(
                    f"group {self.unique_name!r}: FVOPS_TRANSPORT={wanted}, but {self.LIBRARY.BACKEND} cannot be used: "
                    f"{comm.why_disabled}"
                )
            self.why_transport = comm.why_disabled
        elif self.world_size > 1:
            gloo = wanted in ("auto", "symm")
            self.why_transport = "the program chose gloo as backend" if gloo else f"FVOPS_TRANSPORT={wanted}"
        return super()._make_transport()

    def _make_later(self) -> Later:
        return SideStream(self, self._streams) if self._streams.asynchronous else super()._make_later()

    def _pair(self, ends: StatelessProcessGroup, name: str) -> LibraryCommunicator:
        return self.LIBRARY(ends, self.device, **self._options(name))

    def _options(self, name: str) -> dict[str, Any]:
        return {"group_name": name, "timeout_s": self.timeout_s}

    def _issue(self, op: str, tensors: Any, arguments: dict[str, Any], call: Callable[..., Any], *args: Any) -> None:
        if self._symmetric is not None:
            self._symmetric.op = op
        if not self._streams.capturing():
            super()._issue(op, tensors, arguments, call, *args)
            self._warm.add(op)
            return
        if op == "barrier":
            raise RuntimeError(
                f"{checks.where(op, self.unique_name)}: a barrier waits on the host and cannot be part of a CUDA "
                "graph; call it before the capture or after it"
            )
        if op not in self._warm:
            raise RuntimeError(
                f"{checks.where(op, self.unique_name)}: its first use is inside a CUDA-graph capture, where "
                "connections cannot be made; call the group's warmup(shapes, dtype) on every rank before capturing"
            )
        super()._issue(op, tensors, arguments, call, *args)
