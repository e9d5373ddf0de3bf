"""The transport of a group of one rank: what goes to oneself is copied, nothing is sent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fvops.device_communicators.flat_transport import FlatTransport, RefusedError

__all__ = ["SoloTransport"]


class SoloTransport(FlatTransport):
    """Copies on `device`; `send` and `recv` are refused before they get here."""

    name = "none (one rank)"
    world_size = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def exchange(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        for output, input_ in zip(outputs, inputs, strict=True):
            output.copy_(input_)

    def exchange_rows(
        self, output: Tensor, input_: Tensor, output_rows: Sequence[int], input_rows: Sequence[int]
    ) -> None:
        if list(output_rows) != list(input_rows):
            raise RefusedError(f"one rank sends itself {list(input_rows)} rows, but receives {list(output_rows)}")
        output.copy_(input_)

    def all_gather(self, outputs: Tensor, input_: Tensor) -> None:
        outputs[0].copy_(input_)

    def gather(self, outputs: Tensor | None, input_: Tensor, dst: int) -> None:
        if outputs is not None:
            outputs[0].copy_(input_)

    # The output of these is from `like`: it holds the input already.

    def all_reduce(self, output: Tensor, input_: Tensor, reduce_op: str) -> None: ...

    def reduce(self, output: Tensor, input_: Tensor, reduce_op: str, dst: int) -> None: ...

    def reduce_scatter(self, output: Tensor, inputs: Tensor, reduce_op: str) -> None:
        output.copy_(inputs[0])

    def broadcast(self, output: Tensor, input_: Tensor, src: int) -> None: ...

    def barrier(self) -> None:
        """Everybody is here."""

    def close(self) -> None:
        """There is nothing to release."""
