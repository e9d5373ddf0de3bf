"""What an op refuses, and the words it refuses it with. Everything here runs before anything is sent.

The same functions serve an op's eager implementation, its fake, and the traced Python above it, so that a mistake reads
the same in all three.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

__all__ = [
    "REDUCE_OPS",
    "check_all_to_all_4D",
    "check_all_to_all_4D_coalesced",
    "check_all_to_all_4D_packed",
    "check_all_to_all_single",
    "check_chunks",
    "check_concat",
    "check_device",
    "check_dim",
    "check_divisible",
    "check_no_grad",
    "check_own_rank",
    "check_peer",
    "check_place",
    "check_reduce_op",
    "check_strided",
    "check_writable",
    "fail",
    "where",
]

REDUCE_OPS = ("sum", "avg", "max", "min", "product")

# What every transport can reduce, some of it in a wider dtype.
REDUCIBLE = frozenset(
    {
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
        torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
        torch.int8, torch.int16, torch.int32, torch.int64,
        torch.uint8, torch.uint16, torch.uint32, torch.bool,
    }
)  # fmt: skip


def fail(kind: type[Exception], message: str) -> NoReturn:
    """Raise ``kind(message)``, so that the message reaches the user from inside a traced function too.

    Dynamo reports a bare ``raise`` under ``fullgraph=True`` as "Observed exception" without its text, so the text goes
    into a graph break; without ``fullgraph`` the break leaves the raise to eager Python.
    """
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break(msg=message)
    raise kind(message)


def _known(condition: bool) -> bool:
    """`condition`, but False for one on sizes that a trace cannot know (from ``.tolist()``): eager will look again."""
    if isinstance(condition, bool) and not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def _number(size: int) -> int:
    """A size for a message: a traced one is symbolic, and Dynamo formats only constants (`int` leaves it symbolic)."""
    return operator.index(size)


def where(op: str, group_name: str) -> str:
    """How every message begins: the op and the group."""
    return f"fvops.{op} on group {group_name!r}"


def check_strided(op: str, group_name: str, tensor: Tensor) -> None:
    """ValueError for sparse and other layouts without strides."""
    # Dynamo takes no sparse tensor into a graph, and tells no layout in the backward of an autograd.Function.
    other = tensor.is_nested if torch.compiler.is_dynamo_compiling() else tensor.layout != torch.strided
    if other:
        fail(ValueError, f"{where(op, group_name)}: needs a dense (strided) tensor, got layout {tensor.layout}")


def check_device(op: str, group_name: str, tensor: Tensor, device: torch.device) -> None:
    """ValueError for a tensor that is not on the group's device."""
    if tensor.device != device:
        fail(
            ValueError,
            f"{where(op, group_name)}: the tensor is on {tensor.device}, but the group communicates on {device}",
        )


def check_dim(op: str, group_name: str, tensor: Tensor, dim: int) -> int:
    """`dim` counted from the front; ValueError when the tensor has no such dim."""
    ndim = tensor.dim()
    if not -ndim <= dim < ndim:
        fail(ValueError, f"{where(op, group_name)}: dim {_number(dim)} is out of range for a tensor with {ndim} dims")
    return dim if dim >= 0 else dim + ndim


def check_divisible(op: str, group_name: str, what: str, size: int, world_size: int) -> None:
    """ValueError when `size` (of `what`, e.g. "dim 2 (heads)") does not split evenly over the ranks."""
    if size % world_size != 0:
        fail(
            ValueError,
            f"{where(op, group_name)}: {what} has size {_number(size)}, "
            f"which is not divisible by world_size {_number(world_size)}",
        )


def check_place(op: str, group_name: str, what: str, place: int, world_size: int) -> None:
    """ValueError when `place` (`src` or `dst`) is not a place in the group."""
    if not 0 <= place < world_size:
        fail(
            ValueError,
            f"{where(op, group_name)}: {what}={_number(place)} is not a place in the group; "
            f"places are 0 to {_number(world_size - 1)} (global ranks are not accepted)",
        )


def check_reduce_op(op: str, group_name: str, reduce_op: str, dtype: torch.dtype) -> None:
    """ValueError for an unknown reduction, TypeError for one that the dtype does not have."""
    if reduce_op not in REDUCE_OPS:
        fail(ValueError, f"{where(op, group_name)}: unknown reduction {reduce_op!r}; known: {', '.join(REDUCE_OPS)}")
    if dtype not in REDUCIBLE or (dtype == torch.bool and reduce_op in ("sum", "avg")):
        fail(TypeError, f"{where(op, group_name)}: {reduce_op} of {dtype} is not supported")
    if reduce_op == "avg" and not dtype.is_floating_point:
        fail(TypeError, f"{where(op, group_name)}: avg needs a floating-point tensor, got {dtype}")


def check_no_grad(op: str, group_name: str, tensor: Tensor, reason: str = "has no gradient") -> None:
    """RuntimeError when autograd would need a gradient that the op does not have."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        fail(
            RuntimeError,
            f"{where(op, group_name)}: {reason}, but its input requires one; "
            "detach the input or call under torch.no_grad()",
        )


def check_all_to_all_4D(
    group_name: str, input_: Tensor, scatter_dim: int, gather_dim: int, world_size: int, op: str = "all_to_all_4D"
) -> None:
    """ValueError unless `input_` is ``[B, S, H, D]``, the dims are (2, 1) or (1, 2), and the scattered one divides."""
    check_strided(op, group_name, input_)
    if input_.dim() != 4:
        fail(
            ValueError,
            f"{where(op, group_name)}: needs a 4D tensor [batch, sequence, heads, head_size], got {input_.dim()} dims",
        )
    if (scatter_dim, gather_dim) not in ((2, 1), (1, 2)):
        fail(
            ValueError,
            f"{where(op, group_name)}: scatter_dim={_number(scatter_dim)}, gather_dim={_number(gather_dim)} "
            "is not supported; use (2, 1), sequence shards in and head shards out, or (1, 2), its inverse",
        )
    name = "dim 2 (heads)" if scatter_dim == 2 else "dim 1 (sequence)"
    check_divisible(op, group_name, name, input_.size(scatter_dim), world_size)


def check_all_to_all_4D_coalesced(
    group_name: str, inputs: Sequence[Tensor], scatter_dim: int, gather_dim: int, world_size: int
) -> None:
    """ValueError unless there is an input and each is one that `all_to_all_4D` takes; TypeError for no tensors."""
    op = "all_to_all_4D_coalesced"
    if len(inputs) == 0:
        fail(ValueError, f"{where(op, group_name)}: needs at least one tensor, got an empty list")
    for input_ in inputs:
        if not isinstance(input_, Tensor):
            fail(TypeError, f"{where(op, group_name)}: inputs must be tensors, got a {type(input_).__name__}")
        check_all_to_all_4D(group_name, input_, scatter_dim, gather_dim, world_size, op)


def check_all_to_all_4D_packed(
    group_name: str, sends: Sequence[Tensor], scatter_dim: int, gather_dim: int, world_size: int
) -> None:
    """ValueError unless there is a tensor, each is ``[P, batch, sequence, heads, head_size]``, and the dims pair."""
    op = "all_to_all_4D_packed"
    if len(sends) == 0:
        fail(ValueError, f"{where(op, group_name)}: needs at least one tensor, got an empty list")
    for send in sends:
        if send.dim() != 5 or send.size(0) != world_size:
            shape = tuple(map(_number, send.shape))
            fail(ValueError, f"{where(op, group_name)}: needs 5 dims, the first of size {world_size}, got {shape}")
        check_all_to_all_4D(group_name, send[0], scatter_dim, gather_dim, 1, op)


def check_all_to_all_single(
    group_name: str,
    input_: Tensor,
    output_split_sizes: Sequence[int] | None,
    input_split_sizes: Sequence[int] | None,
    world_size: int,
) -> None:
    """ValueError unless dim 0 splits evenly, or both lists have a size a rank and the input's add up to dim 0."""
    op = "all_to_all_single"
    check_strided(op, group_name, input_)
    if input_.dim() == 0:
        fail(ValueError, f"{where(op, group_name)}: needs a tensor with at least one dim to split, got a 0-dim one")
    if input_split_sizes is None and output_split_sizes is None:
        check_divisible(op, group_name, "dim 0", input_.size(0), world_size)
        return
    if input_split_sizes is None or output_split_sizes is None:
        fail(ValueError, f"{where(op, group_name)}: give both input_split_sizes and output_split_sizes, or neither")
    for what, sizes in (("input_split_sizes", input_split_sizes), ("output_split_sizes", output_split_sizes)):
        if len(sizes) != world_size:
            fail(
                ValueError,
                f"{where(op, group_name)}: {what} has {_number(len(sizes))} sizes, "
                f"needs one for each of {_number(world_size)} ranks",
            )
        for size in sizes:
            if _known(size < 0):
                fail(ValueError, f"{where(op, group_name)}: {what} has a negative size {_number(size)}")
    if _known(sum(input_split_sizes) != input_.size(0)):
        fail(
            ValueError,
            f"{where(op, group_name)}: input_split_sizes add up to {_number(sum(input_split_sizes))}, "
            f"but dim 0 of the input has size {_number(input_.size(0))}",
        )


def check_chunks(op: str, group_name: str, input_: Tensor, dim: int, world_size: int) -> int:
    """`dim` counted from the front; ValueError when the input is not dense or `dim` does not split evenly."""
    check_strided(op, group_name, input_)
    dim = check_dim(op, group_name, input_, dim)
    check_divisible(op, group_name, f"dim {_number(dim)}", input_.size(dim), world_size)
    return dim


def check_concat(op: str, group_name: str, input_: Tensor, dim: int) -> int:
    """`dim` counted from the front; ValueError when the input is not dense or cannot be concatenated along `dim`."""
    check_strided(op, group_name, input_)
    return check_dim(op, group_name, input_, dim)


def check_peer(op: str, group_name: str, what: str, peer: int, rank: int, world_size: int) -> None:
    """ValueError unless `peer` is another place of the group."""
    check_place(op, group_name, what, peer, world_size)
    if peer == rank:
        fail(
            ValueError,
            f"{where(op, group_name)}: {what}={_number(peer)} is this rank itself; a peer must be another rank",
        )


def check_writable(op: str, group_name: str, tensor: Tensor) -> None:
    """ValueError for a tensor into which nothing can be received in place: an expanded or an inference tensor."""
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        fail(
            ValueError,
            f"{where(op, group_name)}: cannot be filled in place, several of its elements share memory "
            "(an expanded tensor); use its contiguous() copy",
        )
    # Dynamo cannot ask this; in a compiled function torch's own error says it, after the exchange.
    if not torch.compiler.is_compiling() and tensor.is_inference() and not torch.is_inference_mode_enabled():
        fail(
            ValueError,
            f"{where(op, group_name)}: an inference tensor cannot be filled in place outside torch.inference_mode()",
        )


def check_own_rank(op: str, group_name: str, rank: int, own_rank: int) -> None:
    """RuntimeError when a graph that was made for one rank runs on another."""
    if rank != own_rank:
        fail(
            RuntimeError,
            f"{where(op, group_name)}: the call was made for place {rank}, but this is place {own_rank}: "
            "a function exported on one rank cannot run on another when it uses its rank",
        )
