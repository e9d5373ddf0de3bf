"""Which communicator a group gets: decided here and nowhere else, alike on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist

from fvops import envs
from fvops.device_communicators.base_device_communicator import DeviceCommunicatorBase

__all__ = ["TRANSPORTS", "build_communicator"]

# FVOPS_TRANSPORT -> the device types it serves. "nccl" and "hccl" take CPU tensors too, if the library that
# FVOPS_NCCL_LIBRARY or FVOPS_HCCL_LIBRARY names does (the doubles in tests/doubles do).
TRANSPORTS = {
    "auto": ("cpu", "cuda", "npu"),
    "process_group": ("cpu", "cuda", "npu"),
    "shm": ("cpu",),
    "symm": ("cuda",),
    "nccl": ("cpu", "cuda"),
    "hccl": ("cpu", "npu"),
}


def build_communicator(
    cpu_group: dist.ProcessGroup,
    device: torch.device,
    device_group: dist.ProcessGroup,
    unique_name: str,
    timeout_s: float | None = None,
) -> DeviceCommunicatorBase:
    """The communicator for `device`, over the transport that ``FVOPS_TRANSPORT`` asks for. Collective.

    Raises:
        ValueError: there is no such transport, or it does not serve the device.
        RuntimeError: it was asked for by name and cannot be used on every rank.
    """
    wanted = envs.FVOPS_TRANSPORT
    if wanted not in TRANSPORTS:
        raise ValueError(f"environment variable FVOPS_TRANSPORT={wanted!r}: must be one of {', '.join(TRANSPORTS)}")
    if device.type not in TRANSPORTS[wanted]:
        raise ValueError(
            f"group {unique_name!r}: FVOPS_TRANSPORT={wanted} does not serve {device.type} tensors; "
            f"it serves {', '.join(TRANSPORTS[wanted])}"
        )
    return _class_for(device.type, wanted)(cpu_group, device, device_group, unique_name, timeout_s=timeout_s)


def _class_for(device_type: str, transport: str) -> type[DeviceCommunicatorBase]:
    # Imported here: a CPU program needs no bindings of NCCL or HCCL.
    if device_type == "cuda" or transport == "nccl":
        _need_library(device_type, transport)
        from fvops.device_communicators.cuda_communicator import CudaCommunicator

        return CudaCommunicator
    if device_type == "npu" or transport == "hccl":
        _need_library(device_type, transport)
        from fvops.device_communicators.npu_communicator import NpuCommunicator

        return NpuCommunicator
    if device_type == "cpu":
        from fvops.device_communicators.cpu_communicator import CpuCommunicator

        return CpuCommunicator
    return DeviceCommunicatorBase


def _need_library(device_type: str, transport: str) -> None:
    variable = f"FVOPS_{transport.upper()}_LIBRARY"
    if device_type == "cpu" and not getattr(envs, variable):
        raise ValueError(
            f"FVOPS_TRANSPORT={transport} with CPU tensors needs {variable} to name a library that works on host memory"
        )
