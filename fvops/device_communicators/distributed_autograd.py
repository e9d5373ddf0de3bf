"""Autograd Functions over a raw process group, for programs that called upstream's. New code uses the groups' methods.

They run in eager only: a compiled program's gradients are those of ``torch.ops.fvops``. A `group` here is a
ProcessGroup or a device communicator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fvops import checks
from fvops.reduce_op import reduce_op_name

if TYPE_CHECKING:
    from fvops.device_communicators.base_device_communicator import DeviceCommunicatorBase

__all__ = ["DistributedAutograd"]


def _communicator(group: Any, input_: Tensor) -> DeviceCommunicatorBase:
    # Here, because the communicators' module ends by importing this one.
    from fvops.device_communicators.base_device_communicator import DeviceCommunicatorBase

    if isinstance(group, DeviceCommunicatorBase):
        return group
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup or a device communicator, got {type(group).__name__}")
    return DeviceCommunicatorBase(group, input_.device, group, unique_name=group.group_name)


class _AllReduce(Function):
    @staticmethod
    def forward(ctx: Any, group: Any, input_: Tensor, op: Any) -> Tensor:
        """`op`: a ReduceOp or its name; only sum and avg have a gradient."""
        ctx.communicator = _communicator(group, input_)
        ctx.op = reduce_op_name(op)
        if ctx.needs_input_grad[1] and ctx.op not in ("sum", "avg"):
            where = checks.where("all_reduce", ctx.communicator.unique_name)
            raise RuntimeError(f"{where}: {ctx.op} has no gradient, but its input requires one")
        return ctx.communicator.all_reduce(input_, ctx.op)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, ctx.communicator.all_reduce(grad, ctx.op), None


class _AllGather(Function):
    @staticmethod
    def forward(ctx: Any, group: Any, input_: Tensor, world_size: int, dim: int) -> Tensor:
        """`world_size` is upstream's; the group knows it."""
        ctx.communicator = _communicator(group, input_)
        ctx.dim = dim
        return ctx.communicator.all_gather(input_, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, ctx.communicator.reduce_scatter(grad, "sum", ctx.dim), None, None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, group: Any, input_: Tensor, op: Any, dim: int) -> Tensor:
        ctx.communicator = _communicator(group, input_)
        ctx.op, ctx.dim = reduce_op_name(op), dim
        if ctx.needs_input_grad[1] and ctx.op not in ("sum", "avg"):
            where = checks.where("reduce_scatter", ctx.communicator.unique_name)
            raise RuntimeError(f"{where}: {ctx.op} has no gradient, but its input requires one")
        return ctx.communicator.reduce_scatter(input_, ctx.op, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        gathered = ctx.communicator.all_gather(grad, ctx.dim)
        return None, gathered / ctx.communicator.world_size if ctx.op == "avg" else gathered, None, None


class _AllToAll4D(Function):
    @staticmethod
    def forward(ctx: Any, group: Any, input_: Tensor, world_size: int, scatter_dim: int, gather_dim: int) -> Tensor:
        ctx.communicator = _communicator(group, input_)
        ctx.dims = (gather_dim, scatter_dim)
        return ctx.communicator.all_to_all_4D(input_, scatter_dim, gather_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, ctx.communicator.all_to_all_4D(grad, *ctx.dims), None, None, None


class _AllToAll4DCoalesced(Function):
    @staticmethod
    def forward(ctx: Any, group: Any, scatter_dim: int, gather_dim: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.communicator = _communicator(group, inputs[0])
        ctx.dims = (gather_dim, scatter_dim)
        return tuple(ctx.communicator.all_to_all_4D_coalesced(inputs, scatter_dim, gather_dim))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, None, *ctx.communicator.all_to_all_4D_coalesced(grads, *ctx.dims)


class _AllToAllSingle(Function):
    @staticmethod
    def forward(ctx: Any, group: Any, input_: Tensor, output_split_sizes: Any, input_split_sizes: Any) -> Tensor:
        ctx.communicator = _communicator(group, input_)
        ctx.splits = (input_split_sizes, output_split_sizes)
        return ctx.communicator.all_to_all_single(input_, output_split_sizes, input_split_sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, ctx.communicator.all_to_all_single(grad, *ctx.splits), None, None


class _Slice(Function):
    @staticmethod
    def forward(ctx: Any, group: Any, input_: Tensor, world_size: int, dim: int, scale_grad: bool) -> Tensor:
        ctx.communicator = _communicator(group, input_)
        ctx.dim, ctx.scale_grad = dim, scale_grad
        return ctx.communicator.shard(input_, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        gathered = ctx.communicator.all_gather(grad, ctx.dim)
        return None, gathered / ctx.communicator.world_size if ctx.scale_grad else gathered, None, None, None


class DistributedAutograd:
    """The Functions, by upstream's names: ``DistributedAutograd.AllGather.apply(group, input_, world_size, dim)``."""

    AllReduce = _AllReduce
    AllGather = _AllGather
    ReduceScatter = _ReduceScatter
    AllToAll4D = _AllToAll4D
    AllToAll4DCoalesced = _AllToAll4DCoalesced
    AllToAllSingle = _AllToAllSingle
    Slice = _Slice
