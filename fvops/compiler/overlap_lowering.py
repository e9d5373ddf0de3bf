"""How Inductor keeps what stands between the start and the wait of an exchange there, and both ends' memory alone.

The wait is a `_CollectiveKernel` that reads the very buffers that the start was handed, so that they are in use until
it has run. Inductor orders kernels by what they read, and then by the memory that an order needs: nothing in that keeps
a matrix product between the two. So every kernel of its own (one that is not a loop, which may fuse with a neighbour)
that stands there depends on the start, and the wait on it, by name and without keeping a buffer alive.

Checked on torch 2.11 and 2.13; `compile_tests/test_pass_overlap.py` fails when the order is lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import register_lowering
from torch._inductor.virtualized import V

__all__ = ["register"]


def register() -> None:
    """Register the lowering of the wait; the start's is that of every ordered op."""
    register_lowering(torch.ops.fvops.all_to_all_4D_wait.default, type_promotion_kind=None)(_lower_wait)


def _lower_wait(ticket: Any, inputs: list[Any], *arguments: Any) -> list[Any]:
    start: Any = V.graph.get_buffer(ticket.get_name())
    # Not `inputs`: a view that has to be copied for the call would be copied once more.
    (sent, *_), _ = start.unflatten_args(start.inputs, start.constant_args)
    # A bare buffer would be copied, too; a view of one is taken as it is.
    sent = [ir.TensorBox.create(tensor) if isinstance(tensor, ir.Buffer) else tensor for tensor in sent]
    op = torch.ops.fvops.all_to_all_4D_wait.default
    received: Any = ir._CollectiveKernel.create_out_of_place(op, ticket, sent, *arguments)
    _keep_between(start, received[0].inputs[0])
    return [ir.TensorBox.create(tensor) for tensor in received]


def _keep_between(start: Any, wait: Any) -> None:
    operations = V.graph.operations
    dependencies = V.graph.additional_buffer_deps
    for operation in operations[operations.index(start) + 1 : operations.index(wait)]:
        if not isinstance(operation, (ir.ComputedBuffer, ir.MultiOutput)):
            dependencies[operation.get_operation_name()].add(start.get_name())
            dependencies[wait.get_operation_name()].update(buffer.get_name() for buffer in operation.get_outputs())
