"""Collectives between CPU ranks."""

from __future__ import annotations

from typing import Any

from fvops import envs
from fvops.device_communicators.base_device_communicator import DeviceCommunicatorBase
from fvops.device_communicators.shm import ShmTransport
from fvops.logger import init_logger

__all__ = ["CpuCommunicator"]

logger = init_logger(__name__)


class CpuCommunicator(DeviceCommunicatorBase):
    """Over shared memory where all ranks of the group can, else over gloo. Chosen at creation, alike on all ranks.

    Raises:
        RuntimeError: ``FVOPS_TRANSPORT=shm``, and a rank cannot; says which and why.
    """

    def _make_transport(self) -> Any:
        if self.world_size > 1:
            wanted = envs.FVOPS_TRANSPORT
            refusal = f"FVOPS_TRANSPORT={wanted}" if wanted == "process_group" else ""
            transport, words = ShmTransport.create(
                self.cpu_group, self.unique_name, refusal=refusal, timeout_s=self.timeout_s
            )
            self.why_transport = words
            if transport is not None:
                return transport
            if wanted == "shm":
                raise RuntimeError(f"group {self.unique_name!r}: FVOPS_TRANSPORT=shm, but {words}")
            logger.info("group %r: %s", self.unique_name, words)
        return super()._make_transport()
