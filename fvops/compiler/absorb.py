"""absorb: projections that read received slices and write packed buffers, so that no kernel unpacks or packs for them.

What comes out of an exchange that is opened up lies by source, ``[P, rows, h*D]``, and an output projection wants
``[rows, P*h*D]``. But ``x @ W`` is the sum over p of ``recv_p @ W_p``, where W_p are W's rows p*h*D and on. The other
way round a projection whose result is only packed computes the packed buffer itself, part by part.

- `read_slices`, on the joint (or inference) graph, before it is decided what backward saves: a projection of what was
  received becomes the chain of matrix products above, its weight's gradient one product for each source.
- `write_packed`, on a lowered graph: a product that only a pack reads becomes a batched product in the packed order.
- `sum_in_one_buffer`, last on a lowered graph: the products of a chain become one call, which sums into one buffer.

Letters: P world size, B batch, s sequence, h heads and D head size of a part; rows = B*s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from fvops.compiler import layout
from fvops.compiler.log import note
from fvops.compiler.token_chain import arguments_of, calls, is_call, result_of

__all__ = ["read_slices", "sum_in_one_buffer", "write_packed"]

aten = torch.ops.aten
# Keep the elements in order, so that a result of two dims is the matrix that the name `x_RC` says.
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.alias.default, aten.detach.default)
_MOVES = (*_VIEWS, aten.permute.default, aten.clone.default)
_MATRIX_PRODUCTS = (aten.mm.default, aten.addmm.default)
# Each partial product is rounded to the result's dtype: half types would lose digits that one product keeps.
_WIDE = (torch.float32, torch.float64)
_CHECKPOINTING = ("recompute", "ac_graph_id")
# Marks a product that is added to the one before it.
_ADDED = "fvops_added"


def read_slices(graph: Graph, setting: str) -> int:
    """Let projections read the slices of (1, 2) exchanges that `setting`, the `layout` switch, opens up; how many."""
    absorbed = 0
    for call in calls(graph):
        received = result_of(call) if is_call(call, (torch.ops.fvops.all_to_all_4D.default,)) else None
        if received is None or arguments_of(call)[1:3] != (1, 2) or not layout.is_opened_up(call, setting):
            continue
        if received.meta["val"].dtype in _WIDE and all(map(_is_static, received.meta["val"].shape[2:])):
            readers = _readers(received)
            if readers:
                _read_slices(call, readers)
                absorbed += len(readers)
    return absorbed


def _is_static(size: Any) -> bool:
    return isinstance(size, int)


def _readers(received: Node) -> list[tuple[Node, Node]]:
    """(product, operand) for each product that reads `received [B, s, H, D]` as a matrix; none if a kernel stays.

    Whoever else reads it must be a sum, whose kernel reads the parts where they lie, or be on the way to such.
    """
    columns = received.meta["val"].shape[2] * received.meta["val"].shape[3]
    found: list[tuple[Node, Node]] = []
    todo = [received]
    while todo:
        node = todo.pop()
        for user in node.users:
            if user.target in _VIEWS:
                todo.append(user)
            elif user.target is aten.permute.default and _is_matrix(node, columns) and user.args[1] == [1, 0]:
                if not all(_is_product(product, user) for product in user.users):
                    return []
                found += [(product, user) for product in user.users]
            elif _is_matrix(node, columns) and _is_product(user, node):
                found.append((user, node))
            elif user.target not in (aten.sum.dim_IntList, aten.sym_size.int):
                return []
    # With both factors out of this tensor, each would need the other's parts.
    products = [product for product, _ in found]
    return found if len(set(products)) == len(products) else []


def _is_matrix(node: Node, columns: int) -> bool:
    shape = node.meta["val"].shape
    return len(shape) == 2 and _is_static(shape[1]) and shape[1] == columns


def _is_product(node: Node, operand: Node) -> bool:
    if node.target not in _MATRIX_PRODUCTS or node.kwargs or list(node.args).count(operand) != 1:
        return False
    is_left, is_transposed = _role(node, operand)
    # A bias is added to a sum over the parts; parts of the result that stand side by side would each need their own.
    return operand in _factors(node) and (is_left != is_transposed or node.target is aten.mm.default)


def _factors(product: Node) -> tuple[Node, Node]:
    args: Any = product.args
    return args[-2], args[-1]


def _bias(product: Node) -> Node | None:
    args: Any = product.args
    return args[0] if len(args) == 3 else None


def _role(product: Node, operand: Node) -> tuple[bool, bool]:
    """Is `operand` the left one, and is it the transposed matrix?"""
    return _factors(product)[0] is operand, operand.target is aten.permute.default


def _read_slices(call: Node, readers: list[tuple[Node, Node]]) -> None:
    recv_PBSHD = layout.open_up(call)[0]
    P, _, _, h, D = recv_PBSHD.meta["val"].shape
    for product, operand in readers:
        is_left, is_transposed = _role(product, operand)
        parts = _run(product, aten.view.default, recv_PBSHD, [P, -1, h * D])
        pieces = [_run(product, aten.select.int, parts, 0, p) for p in range(P)]
        if is_transposed:
            pieces = [_run(product, aten.permute.default, piece, [1, 0]) for piece in pieces]
        other = _factors(product)[1 if is_left else 0]
        if is_left == is_transposed:
            products = [_pair(product, piece, other, is_left) for piece in pieces]
            result = _run(product, aten.cat.default, products, 0 if is_left else 1)
        else:
            result = _chain(product, pieces, other, h * D, is_left)
        product.replace_all_uses_with(result)
        note("absorb", f"{_name(product)} reads the {P} parts that all_to_all_4D received", product)
        _erase_unread(product)


def _chain(product: Node, pieces: list[Node], other: Node, width: int, is_left: bool) -> Node:
    """The sum over the parts of part times the rows (or columns) of `other` that belong to it."""
    bias = _bias(product)
    chain = [] if bias is None else [bias]
    for p, piece in enumerate(pieces):
        of_part = _run(product, aten.slice.Tensor, other, 0 if is_left else 1, p * width, (p + 1) * width)
        pair = (piece, of_part) if is_left else (of_part, piece)
        if chain:
            chain.append(_run(product, aten.addmm.default, chain[-1], *pair))
            chain[-1].meta[_ADDED] = p > 0
        else:
            chain.append(_run(product, aten.mm.default, *pair))
    return chain[-1]


def _pair(product: Node, piece: Node, other: Node, is_left: bool) -> Node:
    return _run(product, aten.mm.default, *((piece, other) if is_left else (other, piece)))


def _run(product: Node, op: Any, *arguments: Any) -> Node:
    """A new node in front of `product`; backward computes it again if it would have computed `product` again."""
    node = layout.run(product, op, *arguments)
    node.meta.update({key: product.meta[key] for key in _CHECKPOINTING if key in product.meta})
    return node


def _erase_unread(node: Node) -> None:
    """Erase `node`, and what only it read and only moves elements."""
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for source in inputs:
        if not source.users and source.target in (*_MOVES, *_MATRIX_PRODUCTS):
            _erase_unread(source)


def sum_in_one_buffer(graph: Graph) -> int:
    """Make one `sum_of_products` of each chain of products; how many.

    `addmm` would copy what it adds to. To be run last: Inductor's own passes know products, not this op.
    """
    summed = 0
    for node in list(graph.nodes):
        if _adds(node) and not any(_adds(user) and user.args[0] is node for user in node.users):
            chain = [node]
            # What is added to has no other reader: else the sum so far is wanted, too.
            while _adds(chain[0]) and len(chain[0].args[0].users) == 1 and _is_term(chain[0].args[0]):
                chain.insert(0, chain[0].args[0])
            if len(chain) > 1:
                _sum_in_one_buffer(chain)
                summed += 1
    return summed


def _adds(node: Node) -> bool:
    return bool(node.meta.get(_ADDED)) and node.target is aten.addmm.default


def _is_term(node: Node) -> bool:
    return node.target in _MATRIX_PRODUCTS and not node.kwargs


def _sum_in_one_buffer(chain: list[Node]) -> None:
    last = chain[-1]
    left, right = zip(*map(_factors, chain), strict=True)
    op = torch.ops.fvops.sum_of_products.default
    last.replace_all_uses_with(_run(last, op, _bias(chain[0]), list(left), list(right)))
    for product in reversed(chain):
        product.graph.erase_node(product)


def write_packed(graph: Graph) -> int:
    """Let products that only the pack of a (2, 1) exchange reads write the packed buffer; how many do."""
    written = 0
    for call in calls(graph):
        if is_call(call, (torch.ops.fvops.all_to_all_4D_packed.default,)) and arguments_of(call)[1:3] == (2, 1):
            for send in arguments_of(call)[0]:
                product = _packed_product(send)
                if product is not None:
                    _write_packed(product, send)
                    written += 1
    return written


def _packed_product(send_PBSHD: Node) -> Node | None:
    """The product that `send_PBSHD` is nothing but the packed result of."""
    moves: list[Any] = [aten.clone.default, aten.permute.default]
    node = send_PBSHD
    while (moves and node.target is moves[0]) or (not moves and node.target in _VIEWS):
        moves = moves[1:]
        node = node.all_input_nodes[0]
        if len(node.users) != 1:
            return None
    if moves or node.target not in _MATRIX_PRODUCTS or node.kwargs:
        return None
    P, _, _, h, D = send_PBSHD.meta["val"].shape
    columns = node.meta["val"].shape[1]
    if not all(map(_is_static, (columns, _factors(node)[1].meta["val"].shape[0], h, D))) or columns != P * h * D:
        return None
    if sum(not _is_static(size) for size in send_PBSHD.meta["val"].shape) > 1:
        return None
    bias = _bias(node)
    # Not a bias of one element, which addmm spreads over the columns.
    return node if bias is None or tuple(bias.meta["val"].shape) == (columns,) else None


def _write_packed(product: Node, send_PBSHD: Node) -> None:
    """``x [rows, K] @ W [K, P*h*D] -> [P, rows, h*D]``, as P products that share x."""
    P, _, _, h, D = send_PBSHD.meta["val"].shape
    x_RK, w_KC = _factors(product)
    K = w_KC.meta["val"].shape[0]
    parts_of_w = _run(product, aten.view.default, w_KC, [K, P, h * D])
    w_PKC = _run(product, aten.permute.default, parts_of_w, [1, 0, 2])
    x_PRK = _run(product, aten.expand.default, _run(product, aten.unsqueeze.default, x_RK, 0), [P, -1, -1])
    bias = _bias(product)
    if bias is not None:
        bias = _run(product, aten.view.default, bias, [P, 1, h * D])
        made = _run(product, aten.baddbmm.default, bias, x_PRK, w_PKC)
    else:
        made = _run(product, aten.bmm.default, x_PRK, w_PKC)
    # At most one of B and S is symbolic: see `_packed_product`.
    shape = [size if _is_static(size) else -1 for size in send_PBSHD.meta["val"].shape]
    send_PBSHD.replace_all_uses_with(_run(product, aten.view.default, made, shape))
    note("absorb", f"{_name(product)} writes the buffer that all_to_all_4D sends", product)
    _erase_unread(send_PBSHD)


def _name(product: Node) -> str:
    target: Any = product.target
    return str(target.overloadpacket.__name__)
