"""Which kind of device this process computes on; decided once, on first use, never at import."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Platform", "current_platform", "default_backend", "local_torch_device"]

# torch.distributed's backend for each device type.
_BACKENDS = {"cuda": "nccl", "npu": "hccl", "cpu": "gloo"}


class Platform:
    """A device type and what follows from it.

    Attributes:
        device_type: torch's name for the device, ``"cuda"``, ``"npu"`` or ``"cpu"``.
        device_name: the name people use, ``"cuda"``, ``"rocm"``, ``"npu"`` or ``"cpu"``.
    """

    def __init__(self, device_type: str, device_name: str) -> None:
        self.device_type = device_type
        self.device_name = device_name

    def is_cuda(self) -> bool:
        """An NVIDIA GPU."""
        return self.device_name == "cuda"

    def is_cuda_alike(self) -> bool:
        """An NVIDIA GPU, or an AMD one behind torch's CUDA interface."""
        return self.device_type == "cuda"

    def is_npu(self) -> bool:
        """An Ascend NPU (torch_npu)."""
        return self.device_type == "npu"

    def is_cpu(self) -> bool:
        return self.device_type == "cpu"


def _detect() -> Platform:
    if torch.cuda.is_available():
        return Platform("cuda", "rocm" if torch.version.hip else "cuda")
    npu = getattr(torch, "npu", None)
    if npu is not None and npu.is_available():
        return Platform("npu", "npu")
    return Platform("cpu", "cpu")


def default_backend() -> str:
    """The torch.distributed backend of this platform: nccl, hccl or gloo."""
    return _BACKENDS[_platform().device_type]


def local_torch_device(local_rank: int) -> torch.device:
    """``cuda:LOCAL_RANK``, ``npu:LOCAL_RANK``, else ``cpu``."""
    platform = _platform()
    return torch.device("cpu") if platform.is_cpu() else torch.device(platform.device_type, local_rank)


_current: Platform | None = None


def _platform() -> Platform:
    global _current
    if _current is None:
        _current = _detect()
    return _current


current_platform: Platform  # filled in by __getattr__, so that importing this module starts no CUDA context


def __getattr__(name: str) -> Any:
    if name == "current_platform":
        return _platform()
    raise AttributeError(f"module 'fvops.platforms' has no attribute {name!r}")
