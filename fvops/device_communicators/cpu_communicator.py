"""Collectives between CPU ranks."""

from __future__ import annotations

from fvops.device_communicators.base_device_communicator import DeviceCommunicatorBase

__all__ = ["CpuCommunicator"]


class CpuCommunicator(DeviceCommunicatorBase):
    """The base communicator over gloo, which has every reduction; what it cannot carry travels as bytes."""
