"""Reads the kernels of a graph out of Inductor's scheduler: after fusion and all passes, before code is generated.

Inductor's own plan is the one place that knows what became a kernel of its own. Generated code would say the same, but
differs between CPU and GPU and takes seconds to compile. `lowered` stops in between: a graph costs well under a second,
and no compiler has to be installed.

Checked on torch 2.11 and 2.13; `compile_tests/test_internals.py` fails when one of these internals moves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch._inductor import ir, scheduler
from torch._inductor.dependencies import WeakDep
from torch._inductor.fx_utils import count_flops_fx
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.fx import Node
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from fvops.graph_report.contents import Collective, Kernel
from fvops.graph_report.data_movement import only_moves
from fvops.graph_report.estimate import sent_bytes
from fvops.graph_report.user_lines import line_of_trace

__all__ = ["kernels_of", "lowered", "memory_of"]

_GEMM = re.compile(
    r"\b(mm|bmm|addmm|sum_of_products|baddbmm|_int_mm|_scaled_mm|convolution|linear|_linear_pointwise)\b"
)
# Ops of a group that send nothing.
_LOCAL = ("shard",)


@contextmanager
def lowered(look: Callable[[GraphLowering], None]) -> Iterator[None]:
    """Inside, Inductor hands each graph, scheduled, to `look` and makes no code: its result must not be called."""

    def stop_here(graph: GraphLowering) -> Any:
        graph.init_wrapper_code()
        graph._update_scheduler()
        look(graph)
        return _NotGenerated

    before = GraphLowering.compile_to_module
    GraphLowering.compile_to_module = stop_here  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        GraphLowering.compile_to_module = before  # type: ignore[method-assign]


class _NotGenerated:
    """Stands for the module that Inductor would have written."""

    @staticmethod
    def call(*args: Any) -> Any:
        raise RuntimeError("fvops.report: no code was generated for this graph")


def kernels_of(graph: GraphLowering) -> list[Kernel]:
    """The kernels, in order, without times."""
    kernels: list[Kernel] = []
    # A buffer's name -> the kernels that make it.
    makers: dict[str, list[str]] = {}
    for node in graph.scheduler.nodes:
        reads = [dep.name for dep in node.read_writes.reads if not isinstance(dep, WeakDep)]
        reads_from = list(dict.fromkeys(maker for name in reads for maker in makers.get(name, [])))
        made_by = reads_from
        # Else it is one of several results, or a concatenation whose parts were written in place.
        if _is_kernel(node):
            made_by = [node.get_name()]
            kernels.append(_kernel(node, tuple(reads_from)))
        makers.update(dict.fromkeys(node.get_buffer_names(), made_by))
    return [_with_neighbours(kernel, kernels) if kernel.kind == "layout" else kernel for kernel in kernels]


def memory_of(graph: GraphLowering) -> tuple[int, int]:
    """Bytes of the graph's inputs, and the largest sum of intermediate and final results that are alive at once."""
    inputs = [box for box in graph.graph_inputs.values() if isinstance(box, ir.TensorBox)]
    births: dict[int, int] = {}
    deaths: dict[int, int] = {}
    step_of = {name: step for step, node in enumerate(graph.scheduler.nodes) for name in _member_names(node)}
    last = len(graph.scheduler.nodes)
    outputs = set(graph.get_output_names())
    for name, buffer in graph.scheduler.name_to_buf.items():
        if buffer.defining_op_name() not in step_of:
            continue  # eliminated as dead
        born = step_of[buffer.defining_op_name()]
        uses = [step_of.get(user.node.get_name(), last) for user in buffer.users if not user.is_weak]
        if all(step == born for step in uses) and uses and name not in outputs:
            continue  # lives in registers: nobody outside its kernel reads it
        size = _nbytes(buffer.node)
        died = last if name in outputs else max(uses, default=born)
        births[born] = births.get(born, 0) + size
        deaths[died + 1] = deaths.get(died + 1, 0) + size
    alive = peak = 0
    for step in range(last + 1):
        alive += births.get(step, 0) - deaths.get(step, 0)
        peak = max(peak, alive)
    return sum(_nbytes(box) for box in inputs), peak


def _is_kernel(node: Any) -> bool:
    if isinstance(node, scheduler.NopKernelSchedulerNode):
        return False
    return not isinstance(node.node, ir.MultiOutput)


def _member_names(node: Any) -> list[str]:
    return [member.get_name() for member in node.get_nodes()]


def _kernel(node: Any, reads: tuple[str, ...]) -> Kernel:
    own = node.get_name()
    where = _where(node)
    nbytes = int(node.get_read_write_buffers_sizes())
    if not isinstance(node, scheduler.ExternKernelSchedulerNode):
        if any(member.is_template() for member in node.get_nodes()):
            return Kernel(own, "gemm", "template", nbytes, _template_flops(node), where, reads)
        kind = "layout" if all(only_moves(member._body) for member in node.get_nodes()) else "fused"
        return Kernel(own, kind, "", nbytes, 0, where, reads)
    op = getattr(node.node, "op_overload", None)
    name = _op_name(op) or getattr(node.node, "python_kernel_name", None) or type(node.node).__name__
    collective = _collective(node.node, op)
    if collective is not None:
        return Kernel(own, "collective", name, nbytes, 0, where, reads, collective=collective)
    kind = _extern_kind(name)
    return Kernel(own, kind, name, nbytes, _flops(node.node, name), where, reads)


def _op_name(op: Any) -> str:
    return str(op.name()).removesuffix(".out").removesuffix(".default") if isinstance(op, torch._ops.OpOverload) else ""


def _extern_kind(name: str) -> str:
    if name.startswith(("fvops::", "_c10d_functional::")) and "wait" in name:
        return "wait"
    if "scaled_dot_product" in name or "flex_attention" in name:
        return "attention"
    return "gemm" if _GEMM.search(name) else "other"


def _collective(kernel: Any, op: Any) -> Collective | None:
    """The collective that an extern kernel is, by its op's group argument; None for other kernels."""
    if not isinstance(op, torch._ops.OpOverload) or op.namespace not in ("fvops", "_c10d_functional"):
        return None
    arguments = [argument.name for argument in op._schema.arguments]
    if "group_name" not in arguments or "wait" in op._opname or op._opname in _LOCAL:
        return None
    args, kwargs = kernel.unflatten_args(kernel.inputs, kernel.constant_args)
    given = {**dict(zip(arguments, args, strict=False)), **kwargs}
    tensors = _tensors(given.values()) or _tensors([kernel])  # recv is handed none and makes one
    shapes = tuple(tuple(_hint(size) for size in tensor.get_size()) for tensor in tensors)
    nbytes = sum(_nbytes(tensor) for tensor in tensors)
    world_size = int(given.get("world_size", given.get("group_size", 0)))
    is_torch = op.namespace == "_c10d_functional"
    return Collective(
        op=f"{op.namespace}.{op._opname}" if is_torch else op._opname,
        group=str(given["group_name"]),
        world_size=world_size,
        shapes=shapes,
        dtype=", ".join(dict.fromkeys(str(tensor.get_dtype()).removeprefix("torch.") for tensor in tensors)),
        nbytes=nbytes,
        sent_bytes=sent_bytes(op._opname, nbytes, world_size),
        is_start=is_torch or op._opname.endswith("_start"),
    )


def _tensors(values: Any) -> list[Any]:
    found = []
    for value in values:
        if isinstance(value, (list, tuple)):
            found += _tensors(value)
        elif isinstance(value, ir.IRNode) and not isinstance(getattr(value, "layout", None), ir.NoneLayout):
            found.append(value)
    return found


def _nbytes(value: Any) -> int:
    layout = getattr(value, "layout", None)
    # Such a buffer is a view of another, changes another, or only stands for several that follow.
    if isinstance(layout, (ir.NonOwningLayout, ir.MutationLayoutSHOULDREMOVE, ir.MultiOutputLayout, ir.NoneLayout)):
        return 0
    numel = 1
    for size in value.get_size():
        numel *= _hint(size)
    return numel * int(value.get_dtype().itemsize)


def _hint(size: Any) -> int:
    return int(V.graph.sizevars.optimization_hint(size, fallback=0))


def _flops(kernel: Any, name: str) -> int:
    op = getattr(kernel, "op_overload", None)
    # A kernel with several results has no one origin.
    node = kernel.get_origin_node() or next((found for found in kernel.get_origins() if found.target is op), None)
    if node is None:
        return 0
    if "scaled_dot_product" in name:
        # The registry of formulas lacks the CPU's kernels.
        shapes = [_shape(arg) for arg in node.args[:4] if isinstance(arg, Node)]
        backward = "backward" in name
        return int(sdpa_backward_flop_count(*shapes[:4]) if backward else sdpa_flop_count(*shapes[:3]))
    if name == "fvops::sum_of_products":
        _, left, right = node.args
        pairs = ((_shape(a), _shape(b)) for a, b in zip(left, right, strict=True))
        return sum(2 * R * K * C for (R, K), (_, C) in pairs)
    return int(count_flops_fx(node) or 0)


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(_hint(size) for size in node.meta["val"].shape)


def _template_flops(node: Any) -> int:
    return sum(
        int(count_flops_fx(origin) or 0)
        for member in node.get_nodes()
        if member.is_template()
        for origin in [member.node.get_origin_node()]
        if origin is not None
    )


def _where(node: Any) -> str:
    # Origins are a set: the earliest node with a trace, so that two runs say the same.
    origins = [origin for member in node.get_nodes() for origin in member.node.get_origins()]
    order = {found: place for place, found in enumerate(V.graph.graph.nodes)}
    for origin in sorted(origins, key=lambda found: order.get(found, len(order)), reverse=True):
        where = line_of_trace(origin.meta.get("stack_trace") or "")
        if where:
            return where
    return ""


def _with_neighbours(kernel: Kernel, kernels: list[Kernel]) -> Kernel:
    names = {other.name: other.op or other.kind for other in kernels}
    makers = [names[name] for name in kernel.reads if name in names]
    readers = [other.op or other.kind for other in kernels if kernel.name in other.reads]
    return replace(kernel, beside=tuple(dict.fromkeys([*makers, *readers])))
