"""How an op is defined: one call gives ``torch.ops.fvops.<name>`` its schema, fake, gradient, effect and eager code.

`torch.library.Library` rather than ``custom_op``, whose every call costs 10-30 us. The autograd kernel is ours for the
same reason; it is the one place that touches dispatcher internals (checked on torch 2.11 and 2.13,
`compile_tests/test_internals.py` fails when they move).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import _C, Tensor
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op
from torch.autograd import forward_ad
from torch.library import Library

from fvops import compiler
from fvops.debug.calls import fake_observers
from fvops.registry import resolve

__all__ = ["LIBRARY", "Group", "checked_in_python", "define"]


class Group(Protocol):
    """What an op needs to know of a group: constants to a traced function, and guards when it is compiled."""

    unique_name: str
    world_size: int
    rank_in_group: int
    device: torch.device


LIBRARY = Library("fvops", "DEF")

_DispatchKey = _C.DispatchKey
# Where our eager kernels live: with nothing above one of these left to do, the kernel may be called directly.
_BACKENDS = frozenset({_DispatchKey.CPU, _DispatchKey.CUDA, _DispatchKey.PrivateUse1})


def checked_in_python(group: Group, input_: Tensor) -> bool:
    """Must a call's arguments be checked before it comes to the op?

    Under compilation, for an error raised in traced Python reaches the user as itself; for a meta tensor, which to the
    op is a question about shapes; and in a group of one rank, where no op is called (the group must exist even so).
    """
    if torch.compiler.is_compiling() or input_.is_meta:
        return True
    if group.world_size == 1:
        resolve(group.unique_name, 1)
        return True
    return False


def define(
    schema: str,
    *,
    eager: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    refuse_grad: Callable[..., None] | None = None,
    ordered: bool = True,
    differentiated: bool = True,
) -> Any:
    """Define ``fvops::<schema>`` and return its overload.

    Args:
        schema: as in ``Library.define``; the only tensor argument is the first, a tensor or a list of them.
        eager: the implementation on real tensors.
        fake: shapes, dtypes and strides of the result, from the arguments alone.
        backward: ``(grad, input_shape, *other_args) -> grad_input``, lists of each for an op on a list; written with
            ``torch.ops.fvops`` so that it is traced, ordered and differentiable itself. None: the op has no gradient.
        refuse_grad: called with the op's arguments when the input requires a gradient; raises if there is none.
        ordered: the op sends something, so no compiler may drop, merge or move it. Only ops that stay on this rank
            (`shard`) are not.
        differentiated: False for an op that is only put into graphs that have been differentiated: it gets no autograd
            kernel, and may have its tensors anywhere in the schema.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    LIBRARY.impl(name, eager, "CompositeExplicitAutograd")
    overload = getattr(torch.ops.fvops, name).default

    def fake_with_compiler(*args: Any, **kwargs: Any) -> Any:
        compiler.install()
        for observe in fake_observers:
            observe(overload, args)
        return fake(*args, **kwargs)

    torch.library.register_fake(f"fvops::{name}", fake_with_compiler, lib=LIBRARY)
    inputs = [str(argument.type) for argument in overload._schema.arguments if "Tensor" in str(argument.type)]
    if inputs and differentiated:
        make = _autograd_kernel if inputs == ["Tensor"] else _autograd_list_kernel
        LIBRARY.impl(name, make(overload, eager, backward, refuse_grad), "Autograd", with_keyset=True)
    if ordered:
        _register_effectful_op(overload, _EffectType.ORDERED)
        compiler.ordered_ops.append(overload)
    return overload


def _make_run(overload: Any, eager: Callable[..., Any]) -> tuple[Callable[..., Any], dict[int, bool]]:
    """What an op does below autograd, and the key sets that it has learned about (see there)."""
    below_autograd = _C._after_ADInplaceOrView_keyset
    # Key sets seen before (as bits), and whether they leave nothing to do above the back end. Modes and tensor
    # subclasses have bits of their own. Looking the bits up costs a fifth of asking for the highest key.
    plain: dict[int, bool] = {}

    def run(keyset: Any, *args: Any) -> Any:
        bits = keyset.raw_repr()
        if bits not in plain:
            plain[bits] = (keyset & below_autograd).highestPriorityTypeId() in _BACKENDS
        # Plain tensors and no mode: what the dispatcher would do next is call `eager`. Half the cost of a call.
        if plain[bits]:
            return eager(*args)
        with _C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & below_autograd, *args)

    return run, plain


def _autograd_kernel(
    overload: Any,
    eager: Callable[..., Any],
    backward: Callable[..., Tensor] | None,
    refuse_grad: Callable[..., None] | None,
) -> Callable[..., Any]:
    run, plain = _make_run(overload, eager)
    is_grad_enabled = torch.is_grad_enabled

    if backward is not None:
        differentiable = _make_function(run, backward, f"{overload._opname}_backward")

    def kernel(keyset: Any, input_: Tensor, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_jvp(overload, input_, args)
        if input_.requires_grad and is_grad_enabled():
            if refuse_grad is not None:
                refuse_grad(input_, *args)
            if backward is not None:
                return differentiable.apply(keyset, input_, *args)
        # The common case of `run`, without the call.
        if plain.get(keyset.raw_repr()):
            return eager(input_, *args)
        return run(keyset, input_, *args)

    return kernel


def _refuse_jvp(overload: Any, input_: Tensor, args: tuple[Any, ...]) -> None:
    if forward_ad.unpack_dual(input_).tangent is not None:
        raise RuntimeError(
            f"fvops.{overload._opname} on group {args[-1]!r}: forward-mode differentiation (jvp) is not supported"
        )


def _autograd_list_kernel(
    overload: Any,
    eager: Callable[..., Any],
    backward: Callable[..., Any] | None,
    refuse_grad: Callable[..., None] | None,
) -> Callable[..., Any]:
    """As `_autograd_kernel`, for an op from a list of tensors to a list of as many."""
    if backward is None or refuse_grad is not None:
        raise ValueError(f"fvops.{overload._opname}: an op on a list of tensors needs a gradient for all of them")
    formula: Callable[..., Any] = backward
    run, _ = _make_run(overload, eager)

    class ListFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, args: tuple[Any, ...], *inputs: Tensor) -> Any:
            ctx.args = args
            ctx.input_shapes = [input_.shape for input_ in inputs]
            return tuple(run(keyset, list(inputs), *args))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            # All of them, whoever needs one: every rank must exchange the same tensors.
            grad_inputs = formula(grads, ctx.input_shapes, *ctx.args)
            needed = ctx.needs_input_grad[2:]
            return (None, None, *(grad if needs else None for grad, needs in zip(grad_inputs, needed, strict=True)))

    ListFunction.__name__ = f"{overload._opname}_backward"

    def kernel(keyset: Any, inputs: list[Tensor], *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            for input_ in inputs:
                _refuse_jvp(overload, input_, args)
        if torch.is_grad_enabled() and any(input_.requires_grad for input_ in inputs):
            return list(ListFunction.apply(keyset, args, *inputs))
        return run(keyset, inputs, *args)

    return kernel


def _make_function(run: Callable[..., Any], backward_formula: Callable[..., Tensor], name: str) -> Any:
    class OpFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, input_: Tensor, *args: Any) -> Any:
            ctx.args = args
            ctx.input_shape = input_.shape
            return run(keyset, input_, *args)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return (None, backward_formula(grad, ctx.input_shape, *ctx.args), *(None for _ in ctx.args))

    OpFunction.__name__ = name
    return OpFunction
