"""The torch internals that fvops stands on. A failure here says that upstream moved, and which module to look at."""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import _C


def test_dispatcher_parts_of_the_autograd_kernel() -> None:
    """fvops/ops/_define.py."""
    keys = _C._after_ADInplaceOrView_keyset
    assert keys.has(_C.DispatchKey.CPU)
    assert not keys.has(_C.DispatchKey.AutogradCPU)
    assert not keys.has(_C.DispatchKey.ADInplaceOrView)
    only_cpu = _C.DispatchKeySet(_C.DispatchKey.CPU)
    assert (only_cpu & keys).highestPriorityTypeId() == _C.DispatchKey.CPU
    # A mode must outrank the back end, or the kernel would skip it.
    with_mode = only_cpu.add(_C.DispatchKey.Python).add(_C.DispatchKey.Functionalize)
    assert (with_mode & keys).highestPriorityTypeId() not in (_C.DispatchKey.CPU, _C.DispatchKey.CUDA)
    with _C._AutoDispatchBelowAutograd():
        assert not torch.ones(1, requires_grad=True).mul(2).requires_grad


def test_a_graph_break_shows_its_message() -> None:
    """fvops/checks.py: how an error's text gets through fullgraph=True."""

    def function(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break(msg=f"size {x.size(0)}")
        return x

    with pytest.raises(torch._dynamo.exc.Unsupported, match="size 3"):
        torch.compile(function, backend="eager", fullgraph=True, dynamic=False)(torch.ones(3))


def test_effect_registration() -> None:
    """fvops/ops/_define.py."""
    from torch._higher_order_ops.effects import _EffectType, _register_effectful_op, with_effects

    assert hasattr(_EffectType, "ORDERED")
    assert callable(_register_effectful_op)
    assert f"{with_effects.__module__}.{with_effects.__name__}" == "torch.ops.higher_order.with_effects"


def test_inductor_parts_of_the_lowering() -> None:
    """fvops/compiler/ordered_lowering.py."""
    from torch._inductor import ir
    from torch._inductor.graph import GraphLowering
    from torch._inductor.lowering import lowerings, register_lowering

    kernel = ir._CollectiveKernel
    parameters = list(inspect.signature(kernel.create_out_of_place).parameters)
    assert parameters[:2] == ["kernel", "inputs"]
    assert list(inspect.signature(kernel.process_kernel).parameters)[:1] == ["kernel"]
    assert callable(kernel.get_operation_name)
    assert "device" in inspect.signature(ir.NoneLayout).parameters
    assert callable(register_lowering)
    assert torch.ops.higher_order.with_effects in lowerings
    source = inspect.getsource(GraphLowering.__init__)
    assert "self.additional_buffer_deps" in source
    assert "self.effectful_ops" in source


def test_the_scheduler_reads_our_dependency_by_operation_name() -> None:
    """fvops/compiler/ordered_lowering.py."""
    from torch._inductor import scheduler

    source = inspect.getsource(scheduler.Scheduler.compute_dependencies)
    assert "V.graph.additional_buffer_deps[node.get_name()]" in source


def test_inductor_parts_of_overlap() -> None:
    """fvops/compiler/overlap.py, overlap_lowering.py."""
    from torch._inductor import config, ir
    from torch._inductor.graph import GraphLowering

    assert isinstance(config.graph_partition, bool)
    assert isinstance(config.triton.cudagraphs, bool)
    assert callable(GraphLowering.get_buffer)
    assert "self.operations:" in inspect.getsource(GraphLowering.__init__)
    assert callable(ir.Operation.get_outputs)
    assert list(inspect.signature(ir.TensorBox.create).parameters) == ["data"]
    # A bare buffer is copied for a call, a view that says where it lies is not.
    source = inspect.getsource(ir.ExternKernel.realize_input)
    assert source.index("isinstance(x, TensorBox)") < source.index("isinstance(x, ReinterpretView)")
    assert source.rstrip().endswith("return cls.copy_input(x)")
    for op in (torch.ops.prims._make_token.default, torch.ops.prims._sink_tokens.default):
        assert "Tensor" in str(op._schema)


def test_inductor_parts_of_absorb() -> None:
    """fvops/compiler/absorb_lowering.py."""
    from torch._inductor.lowering import make_fallback

    parameters = list(inspect.signature(make_fallback).parameters)
    assert parameters[:3] == ["op", "layout_constraint", "warn"]


def test_cache_keys_hold_the_mark() -> None:
    """fvops/compiler/cache.py."""
    from torch._inductor import config

    from fvops import compiler
    from fvops.compiler.cache import mark, salt
    from fvops.compiler.switches import chosen

    compiler.install()
    assert config.unsafe_marked_cacheable_functions["torch.ops.higher_order.with_effects"] == mark(chosen())
    assert salt() in mark(chosen())
    assert salt() in str(config.save_config_portable(ignore_private_configs=False))
    assert torch.ops.higher_order.with_effects.cacheable()


def test_symmetric_memory() -> None:
    """fvops/torch_compat.py: the names and the arguments that it uses; what they do needs a GPU."""
    from torch._C._distributed_c10d import _SymmetricMemory
    from torch.distributed import _symmetric_memory

    text = _SymmetricMemory.empty_strided_p2p.__doc__ or ""
    positions = [text.find(name) for name in ("size:", "stride:", "dtype:", "device:", "group_name:")]
    assert -1 not in positions, text
    assert positions == sorted(positions), text
    assert list(inspect.signature(_symmetric_memory.rendezvous).parameters) == ["tensor", "group"]
    assert isinstance(_SymmetricMemory.buffer_ptrs, property)
    with pytest.raises(RuntimeError):  # no such memory for CPU tensors
        _SymmetricMemory.empty_strided_p2p((64,), (1,), torch.uint8, torch.device("cpu"))


def test_inductor_parts_of_the_report() -> None:
    """fvops/graph_report/scheduled.py, data_movement.py."""
    from torch._inductor import ir, scheduler
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.graph import GraphLowering
    from torch._inductor.loop_body import LoopBody
    from torch._inductor.sizevars import SizeVarAllocator

    assert {"inner_compile", "config_patches"} <= set(inspect.signature(compile_fx).parameters)
    assert "compile_to_module()" in inspect.getsource(sys.modules[compile_fx.__module__])
    source = inspect.getsource(GraphLowering.codegen)
    assert source.index("self.init_wrapper_code()") < source.index("self._update_scheduler()")
    assert "fallback" in inspect.signature(SizeVarAllocator.optimization_hint).parameters
    assert callable(scheduler.SchedulerBuffer.defining_op_name)
    assert "is_weak" in inspect.signature(scheduler.NodeUser).parameters
    for name in ("NonOwningLayout", "MutationLayoutSHOULDREMOVE", "MultiOutputLayout", "NoneLayout", "MultiOutput"):
        assert hasattr(ir, name), name
    assert "self.root_block" in inspect.getsource(LoopBody)
    assert "subblocks" in inspect.getsource(LoopBody)
    assert "unflatten_args" in inspect.getsource(ir.ExternKernel)


def test_dynamo_parts_of_the_report() -> None:
    """fvops/graph_report/tracing.py."""
    from torch._dynamo.output_graph import GraphCompileReason
    from torch._dynamo.utils import graph_break_reasons

    before = len(graph_break_reasons)
    found = GraphCompileReason("why", [])
    assert graph_break_reasons.pop() is found
    assert len(graph_break_reasons) == before


def test_the_slots_of_our_passes() -> None:
    """fvops/compiler/passes.py, checkpointing.py."""
    from torch._functorch import config as functorch_config
    from torch._functorch._aot_autograd import graph_compile
    from torch._inductor import config
    from torch._inductor.fx_passes import joint_graph, post_grad

    from fvops import compiler

    compiler.install()
    for slot in ("joint_custom_pre_pass", "post_grad_custom_post_pass"):
        assert getattr(config, slot).uuid().startswith("fvops-")
    assert callable(functorch_config.joint_custom_pass)
    assert "config.joint_custom_pre_pass" in inspect.getsource(joint_graph.joint_graph_passes)
    after = inspect.getsource(post_grad.post_grad_passes).split("config.post_grad_custom_post_pass", 1)[1]
    assert "stable_topological_sort" in after
    assert "config.joint_custom_pass(" in inspect.getsource(graph_compile)


def test_a_program_s_own_passes_run_after_ours() -> None:
    """fvops/compiler/passes.py."""
    from torch._inductor import config

    from fvops import compiler

    seen = []
    compiler.install()
    with config.patch(post_grad_custom_post_pass=lambda graph: seen.append(graph)):
        compiler.install()
        held = config.post_grad_custom_post_pass
        torch.compile(lambda x: x + 1, fullgraph=True)(torch.ones(2))
        compiler.install()
        assert config.post_grad_custom_post_pass is held
    assert len(seen) == 1


def test_the_form_of_an_ordered_call() -> None:
    """fvops/compiler/token_chain.py: ``with_effects(token, op, *arguments)`` gives ``(token, result)``."""
    from torch._higher_order_ops.effects import with_effects

    assert torch.ops.higher_order.with_effects is with_effects
    assert list(inspect.signature(type(with_effects).__call__).parameters) == ["self", "token", "op", "args", "kwargs"]


def test_sizes_are_computed_from_symbols() -> None:
    """fvops/compiler/sizes.py."""
    from torch.fx.experimental.proxy_tensor import make_fx

    from fvops.compiler.sizes import read_from_symbols, same_shape

    def function(x: torch.Tensor, rows: int) -> torch.Tensor:
        y = torch.cat([x, x])
        return y.new_zeros(y.size(0), 7)

    # Equal sizes are one symbol; as from Dynamo, it is an input of the graph.
    graph = make_fx(function, tracing_mode="symbolic")(torch.ones(6, 5), 6).graph
    x, rows, y, size, zeros, _ = graph.nodes
    assert size.target is torch.ops.aten.sym_size.int
    assert rows.meta["val"].node.expr.is_Symbol
    assert read_from_symbols(graph) == 1
    [computed, _] = zeros.args[1]
    assert (computed.target, computed.all_input_nodes) == (operator.mul, [rows])
    assert str(computed.meta["val"]) == str(y.meta["val"].size(0))
    assert size not in graph.nodes
    assert same_shape(x, x)
    assert not same_shape(x, y)


def test_shapes_that_are_equal_here_are_guarded() -> None:
    """fvops/compiler/sizes.py: a number of one rank is a symbol of another, for which the answer has to hold, too."""
    from torch.fx.experimental.proxy_tensor import make_fx

    from fvops.compiler.sizes import same_shape

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + torch.cat([y, y]).sum()

    for rows, frozen, equal in ((6, False, True), (7, False, False), (6, True, False)):
        graph = make_fx(function, tracing_mode="symbolic")(torch.ones(rows), torch.ones(3)).graph
        x, _ = graph.find_nodes(op="placeholder")
        [twice] = graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
        shape_env = x.meta["val"].size(0).node.shape_env
        shape_env.frozen, before = frozen, len(shape_env.guards)
        assert same_shape(x, twice) == equal
        assert len(shape_env.guards) == before + (not frozen)


def test_attention_draws_where_it_has_dropout() -> None:
    """fvops/compiler/token_chain.py."""
    from fvops.compiler.token_chain import is_fixed

    attention, aten = torch.ops.aten._scaled_dot_product_flash_attention.default, torch.ops.aten
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for op, args, kwargs, fixed in (
        (attention, (x, x, x), {}, False),
        (attention, (x, x, x, 0.0), {}, False),
        (attention, (x, x, x, 0.5), {}, True),
        (attention, (x, x, x), {"dropout_p": 0.5}, True),
        (aten.bernoulli.default, (x,), {}, True),
        (aten.copy_.default, (x, x), {}, True),
        (aten.sin.default, (x,), {}, False),
    ):
        assert is_fixed(graph.call_function(op, args, kwargs)) == fixed


@pytest.mark.parametrize(
    "size",
    [
        lambda n: -(-n // 4),
        lambda n: 5 * (n + 3) // 2 + n % 4,
        lambda n: n * n,
        lambda n: torch.sym_max(n, 7),
        lambda n: torch.sym_int(n * 1.5),
        lambda n: 2 * torch.sym_int(n * 1.5) + n,
    ],
)
def test_sizes_are_written_as_the_program_computed_them(size: Callable[[Any], Any]) -> None:
    """fvops/compiler/sizes.py: torch cannot write a rounding, but the program's own is there."""
    from torch.fx.experimental.proxy_tensor import make_fx

    from fvops.compiler.sizes import read_from_symbols

    def function(x: torch.Tensor, rows: int) -> torch.Tensor:
        return x.new_ones(size(rows)).cumsum(0)

    traced = make_fx(function, tracing_mode="symbolic")(torch.ones(6, 5), 6)
    made, output = list(traced.graph.nodes)[-2:]
    with traced.graph.inserting_before(output):
        read = traced.graph.call_function(torch.ops.aten.sym_size.int, (made, 0))
    read.meta["val"] = made.meta["val"].size(0)
    output.args = ([made, read],)
    assert read_from_symbols(traced.graph) == 1
    traced.graph.lint()
    traced.recompile()
    result, length = traced(torch.ones(12, 5), 12)
    assert length == len(result) == size(12)


def test_an_overwritten_input_is_described_in_the_joint_graph() -> None:
    """fvops/compiler/overwritten.py."""
    from torch._inductor import config

    from fvops.compiler.overwritten import overwritten

    seen: list[list[str]] = []

    def look(graph: torch.fx.Graph) -> None:
        found = overwritten(graph)
        seen.append([node.name for node in graph.nodes if node.op == "placeholder" and node in found])

    def program(read: torch.Tensor, buffer: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        result = read.sin() + written + buffer
        buffer.add_(1)
        written.mul_(2)
        return result

    with config.patch(joint_custom_pre_pass=look):
        inputs = [torch.rand(3), torch.rand(3), torch.rand(3, requires_grad=True).cos()]
        torch.compile(program, fullgraph=True)(*inputs)
    assert seen == [["primals_2", "primals_3"]]
