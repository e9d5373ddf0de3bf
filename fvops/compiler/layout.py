"""layout: a 4D exchange opened up into layout in aten, an exchange of packed buffers, and layout in aten.

Where the transport moves flat buffers, somebody has to pack what goes to each peer and to lay down what comes. Written
as views, permutations and copies in front of and behind the exchange, both are Inductor's to fuse: the pack with the
kernel that computes q, k or v, the unpack with the one that reads the result. In the graphs that a user sees the
exchange stays one op: this is done just before Inductor lowers a graph.

Letters: P world size, B batch, S sequence, H heads, D head size, s = S/P, h = H/P.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import config
from torch.fx import Graph, Node

from fvops.compiler.log import note
from fvops.compiler.token_chain import (
    add,
    arguments_of,
    calls,
    fake_run,
    index_of,
    insert,
    is_call,
    op_of,
    read,
    remove,
    result_of,
    token_before,
)

__all__ = ["compute_layouts", "is_opened_up", "open_up", "run"]

aten = torch.ops.aten
_Size = Any  # int, or the node that computes it


def compute_layouts(graph: Graph, layout: str) -> int:
    """Open up the exchanges for which `layout` (see `Switches.layout`) says so; how many there were."""
    exchanges = (torch.ops.fvops.all_to_all_4D.default, torch.ops.fvops.all_to_all_4D_coalesced.default)
    opened = 0
    for call in calls(graph):
        if is_call(call, exchanges) and _is_flat(call, layout):
            if config.cpp_wrapper:
                note("layout", f"{op_of(call)._opname} stays whole under cpp_wrapper", call)
            else:
                open_up(call)
                opened += 1
    return opened


def is_opened_up(call: Node, layout: str) -> bool:
    """Does `layout` say that the 4D exchange `call` is to be opened up?"""
    # torch's C++ wrapper (seen on 2.13) crashes where an op of a library returns a list of one tensor.
    return _is_flat(call, layout) and not config.cpp_wrapper


def _is_flat(call: Node, layout: str) -> bool:
    tensors: Any = arguments_of(call)[0]
    first = tensors[0] if isinstance(tensors, (list, tuple)) else tensors
    return layout == "fused" or (layout == "auto" and first.meta["val"].device.type != "cpu")


def open_up(call: Node) -> list[Node]:
    """Open up one 4D exchange; the nodes of what is received, ``[P, B, S, H, D]`` by source, as far as it is read."""
    single = op_of(call) is torch.ops.fvops.all_to_all_4D.default
    inputs: Any = [arguments_of(call)[0]] if single else arguments_of(call)[0]
    scatter_dim, gather_dim, P, group_name = arguments_of(call)[1:]
    pack, unpack = (_pack_heads, _unpack_sequence) if scatter_dim == 2 else (_pack_sequence, _unpack_heads)
    sends = [pack(call, x, P) for x in inputs]
    arguments = (sends, scatter_dim, gather_dim, single, P, group_name)
    old = result_of(call)
    _, token, recvs = insert(call, token_before(call), torch.ops.fvops.all_to_all_4D_packed.default, arguments, call)
    received = []
    if old is not None:
        for item in [old] if single else list(old.users):
            recv = read(call, recvs, 0 if single else index_of(item), item)
            item.replace_all_uses_with(unpack(call, recv, P))
            received.append(recv)
    directed = "heads" if scatter_dim == 2 else "sequence"
    note("layout", f"{op_of(call)._opname}, which scatters {directed}, opened up for {len(inputs)} tensors", call)
    remove(call, token)
    return received


def _pack_heads(call: Node, x_BSHD: Node, P: int) -> Node:
    """``[B, S, P*h, D] -> [P, B, S, h, D]``."""
    B, S, H, D = _sizes(call, x_BSHD)
    parts = run(call, aten.view.default, x_BSHD, [B, S, P, _computed(call, operator.floordiv, H, P), D])
    return _copied(call, run(call, aten.permute.default, parts, [2, 0, 1, 3, 4]))


def _pack_sequence(call: Node, x_BSHD: Node, P: int) -> Node:
    """``[B, P*s, H, D] -> [P, B, s, H, D]``; at B=1 the parts are in order already."""
    B, S, H, D = _sizes(call, x_BSHD)
    s = _computed(call, operator.floordiv, S, P)
    if B == 1:
        return run(call, aten.view.default, x_BSHD, [P, 1, s, H, D])
    parts = run(call, aten.view.default, x_BSHD, [B, P, s, H, D])
    return _copied(call, run(call, aten.permute.default, parts, [1, 0, 2, 3, 4]))


def _unpack_sequence(call: Node, recv_PBSHD: Node, P: int) -> Node:
    """``[P, B, s, H, D] -> [B, P*s, H, D]``; at B=1 a view."""
    _, B, s, H, D = _sizes(call, recv_PBSHD)
    # Not through the permutation at B=1: the stride of a dim of size 1 would not be that of a new tensor.
    parts = recv_PBSHD if B == 1 else _copied(call, run(call, aten.permute.default, recv_PBSHD, [1, 0, 2, 3, 4]))
    return run(call, aten.view.default, parts, [B, _computed(call, operator.mul, s, P), H, D])


def _unpack_heads(call: Node, recv_PBSHD: Node, P: int) -> Node:
    """``[P, B, S, h, D] -> [B, S, P*h, D]``."""
    _, B, S, h, D = _sizes(call, recv_PBSHD)
    parts = _copied(call, run(call, aten.permute.default, recv_PBSHD, [1, 2, 0, 3, 4]))
    return run(call, aten.view.default, parts, [B, S, _computed(call, operator.mul, h, P), D])


def _sizes(call: Node, x: Node) -> list[_Size]:
    return [
        size
        if isinstance(size, int)
        else _known(call, size) or add(call, aten.sym_size.int, (x, dim), call, value=size)
        for dim, size in enumerate(x.meta["val"].shape)
    ]


def _known(call: Node, size: torch.SymInt) -> Node | None:
    """A node before `call` that has this size. To ask `x` for it would make x read twice, and a kernel of its own."""
    for node in call.graph.nodes:
        if node is call:
            break
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr == size.node.expr:
            return node
    return None


def _computed(call: Node, function: Callable[[Any, int], Any], size: _Size, P: int) -> _Size:
    if isinstance(size, int):
        return function(size, P)
    return add(call, function, (size, P), call, value=function(size.meta["val"], P))


def _copied(call: Node, x: Node) -> Node:
    return run(call, aten.clone.default, x, memory_format=torch.contiguous_format)


def run(call: Node, op: Any, *arguments: Any, **keywords: Any) -> Node:
    """A new node that runs `op`, in front of `call` and with its meta data."""
    values = torch.fx.map_arg(arguments, lambda node: node.meta["val"])
    node = add(call, op, arguments, call, value=fake_run(op, *values, **keywords))
    node.kwargs = keywords
    return node
