"""Collectives between CPU ranks, over gloo."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fvops import envs
from fvops.device_communicators.base_device_communicator import DeviceCommunicatorBase
from fvops.device_communicators.pending_sends import PendingSends
from fvops.logger import init_logger

__all__ = ["CpuCommunicator"]

logger = init_logger(__name__)


class CpuCommunicator(DeviceCommunicatorBase):
    """The base communicator, with sends that return before the receiver has posted.

    gloo has every reduction; what it cannot carry (float8, 16-bit integers, bool) travels as bytes or is reduced in a
    wider dtype, see `process_group_transport`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sends = PendingSends(self.unique_name)

    def _send(self, buffer: Tensor, dst: int) -> None:
        self._sends.raise_failure()
        self._sends.add(self.transport.send(buffer, dst), buffer)

    def destroy(self) -> None:
        """Wait for open sends, at most ``FVOPS_TIMEOUT_S``; a send that nobody received is reported as a warning."""
        try:
            self._sends.drain(envs.FVOPS_TIMEOUT_S)
        except RuntimeError as error:
            logger.warning("destroying group %r: %s", self.unique_name, error)
