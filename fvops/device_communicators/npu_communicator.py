"""Collectives between Ascend NPUs."""

from __future__ import annotations

from fvops.device_communicators.accelerator_communicator import AcceleratorCommunicator
from fvops.device_communicators.pyhccl import PyHcclCommunicator

__all__ = ["NpuCommunicator"]


class NpuCommunicator(AcceleratorCommunicator):
    """Over HCCL through pyhccl, else over the torch process group; see `AcceleratorCommunicator`."""

    LIBRARY = PyHcclCommunicator

    @property
    def pyhccl_comm(self) -> PyHcclCommunicator | None:
        """The group's HCCL communicator; None with one rank, and over the torch process group."""
        return self.library_comm  # type: ignore[return-value]
