"""How Inductor keeps the collectives of a graph: all of them, in the order of the graph.

An op with the ORDERED effect is threaded on a token through AOTAutograd, so it is neither dropped nor merged nor moved
there. In Inductor that is not enough: the plain fallback's dependency is kept by buffer name where the scheduler looks
up an operation name, and reordering passes and graph partitioning move what looks free. So each op is lowered to a
`_CollectiveKernel`, whose buffers are not reused while it runs, and each such kernel depends on the one before it *by
operation name*.

Checked on torch 2.11 and 2.13. `compile_tests/test_internals.py` fails when one of these internals moves;
`compile_tests/test_random_programs.py` fails when they no longer keep the order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._higher_order_ops.effects import _EffectType
from torch._inductor import ir
from torch._inductor.lowering import register_lowering
from torch._inductor.virtualized import V

__all__ = ["register"]


def register(ops: list[Any]) -> None:
    """Register the lowering of every op in `ops`."""
    for op in ops:
        register_lowering(op, type_promotion_kind=None)(_lowering(op))


def _lowering(op: Any) -> Callable[..., Any]:
    returns_tensor = bool(op._schema.returns)

    def lower(*args: Any) -> Any:
        result = _create(op, *args) if returns_tensor else _create_void(op, *args)
        if isinstance(result, list):
            # An op with a list of results: each is read out of the one kernel that makes them all.
            _run_after_previous(result[0].inputs[0])
            return [ir.TensorBox.create(output) for output in result]
        _run_after_previous(result)
        return ir.TensorBox.create(result) if returns_tensor else None

    return lower


def _create(op: Any, *args: Any) -> Any:
    return ir._CollectiveKernel.create_out_of_place(op, *args)


def _create_void(op: Any, *args: Any) -> Any:
    """A collective kernel without a result, for which `create_out_of_place` has no layout."""
    with V.graph.fake_mode:
        _, tensor_args, non_tensor_args, unflatten_args, _ = ir._CollectiveKernel.process_kernel(op, *args)
    for tensor_arg in tensor_args:
        tensor_arg.realize()
    # The CPU back end needs a device even where there is no tensor (barrier).
    device = tensor_args[0].get_device() if tensor_args else torch.device("cpu")
    return ir._CollectiveKernel(ir.NoneLayout(device=device), op, tensor_args, non_tensor_args, unflatten_args)


def _run_after_previous(kernel: Any) -> None:
    previous = V.graph.effectful_ops.get(_EffectType.ORDERED)
    if previous is not None:
        V.graph.additional_buffer_deps[kernel.get_operation_name()].add(previous.get_name())
