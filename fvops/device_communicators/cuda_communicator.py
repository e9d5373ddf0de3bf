"""Collectives between GPUs (CUDA, and ROCm behind the same interface)."""

from __future__ import annotations

from fvops.device_communicators.accelerator_communicator import AcceleratorCommunicator
from fvops.device_communicators.pynccl import PyNcclCommunicator
from fvops.device_communicators.symmetric_buffer import TorchSymmetricBuffer

__all__ = ["CudaCommunicator"]


class CudaCommunicator(AcceleratorCommunicator):
    """Over NCCL through pynccl, else over the torch process group; see `AcceleratorCommunicator`.

    Exchanges go one-sided where the ranks can map each other's symmetric memory.
    """

    LIBRARY = PyNcclCommunicator
    SYMMETRIC = TorchSymmetricBuffer

    @property
    def pynccl_comm(self) -> PyNcclCommunicator | None:
        """The group's NCCL communicator; None with one rank, and over the torch process group."""
        return self.library_comm  # type: ignore[return-value]
