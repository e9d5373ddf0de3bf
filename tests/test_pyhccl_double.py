"""PyHcclCommunicator over a double of HCCL that works between processes on host memory and checks what it is handed."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.doubles.fault_suite import FaultSuite
from tests.doubles.suite import LibrarySuite

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the doubles stand on Linux futexes")


class TestPyHccl(LibrarySuite):
    which = "hccl"
    reduced = (
        torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.bfloat16
    )  # fmt: skip
    no_product = (torch.int16, torch.bfloat16)


class TestPyHcclFaults(FaultSuite):
    which = "hccl"
