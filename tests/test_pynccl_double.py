"""PyNcclCommunicator over a double of NCCL that works between processes on host memory and checks what it is handed."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.doubles import faults
from tests.doubles.fault_suite import LATE, FaultSuite, check_story
from tests.doubles.suite import LibrarySuite
from tests.harness import Ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the doubles stand on Linux futexes")


class TestPyNccl(LibrarySuite):
    which = "nccl"
    reduced = (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int8, torch.uint8, torch.int32, torch.int64,
    )  # fmt: skip


class TestPyNcclFaults(FaultSuite):
    which = "nccl"

    def test_a_call_that_nccl_never_takes_ends_at_its_deadline(self) -> None:
        for rank, story in enumerate(self.stories("never taken", 2, 1)):
            check_story(self.which, story, "all_reduce", LATE if rank == 1 else "", rank)

    def test_destroy_ends_when_finalizing_does_not(self) -> None:
        (fine, _), (text, left) = Ranks.get(2).run(
            faults.in_life, "nccl", self.path, "endless finalize", 1, deadline_s=60
        )
        assert fine == "None"
        assert "was not done within 0.5 s" in text
        assert left is None
