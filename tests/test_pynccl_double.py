"""PyNcclCommunicator over a double of NCCL that works between processes on host memory and checks what it is handed."""

from __future__ import annotations

import torch

from tests.doubles.suite import LibrarySuite


class TestPyNccl(LibrarySuite):
    which = "nccl"
    reduced = (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int8, torch.uint8, torch.int32, torch.int64,
    )  # fmt: skip
