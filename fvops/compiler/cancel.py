"""cancel: an exchange that its inverse undoes, with only elementwise work between, disappears.

An all_to_all_4D moves elements between ranks and computes nothing. So for an elementwise f, ``E'(f(E(x))) = f(x)``, if
every rank runs the same f: the pass replays f on x and drops E', and E too once nothing reads it. Between the two may
stand operations on one element of each operand (all operands exchanged alike, or numbers, also such that fill a
tensor), permutations of the dims that add up to none, and views of other shapes (flatten, reshape) that are taken back:
a view keeps the order of the elements, so what an elementwise f does under another shape it does to the same elements
under the old one.

An exchange of a list (`all_to_all_4D_coalesced`) goes as a whole: if all its tensors are undone, by exchanges of lists
or of single tensors. What a training graph's backward reads is part of the joint graph, so its exchanges disappear by
the same rule.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from fvops.compiler.log import note
from fvops.compiler.overwritten import overwritten
from fvops.compiler.sizes import is_number, same_shape
from fvops.compiler.token_chain import (
    add,
    arguments_of,
    calls,
    fake_run,
    index_of,
    inputs_of,
    insert,
    is_call,
    is_read,
    op_of,
    remove,
    result_of,
    token_before,
)

__all__ = ["cancel_inverses", "drop_elided", "elide"]

aten = torch.ops.aten
# Change no element, whatever the strides.
_COPIES = (aten.clone.default, aten.alias.default, aten.detach.default)
# Another shape, the elements in the same order. What else they are given, sizes, is no tensor.
_VIEWS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
_IDENTITY = (0, 1, 2, 3)


@dataclasses.dataclass(frozen=True)
class _Image:
    """What a node is: `source`'s elements, exchanged by `direction`, with the dims permuted by `order`.

    Attributes:
        direction: scatter dim, gather dim, world size and group.
        order: ``order[i]`` is the dim of the exchanged tensor that is dim i of the node.
        viewed: None; or, if the node is a view of those elements under another shape, a node of the shape that has to
            come back.
    """

    direction: tuple[Any, ...]
    order: tuple[int, ...]
    viewed: Node | None = None

    def is_like(self, other: _Image | None) -> bool:
        """Does `other`, of the same shape, have elements in the same places?"""
        if other is None or (self.direction, self.order) != (other.direction, other.order):
            return False
        if self.viewed is None or other.viewed is None:
            return self.viewed is other.viewed
        return same_shape(self.viewed, other.viewed)


@dataclasses.dataclass(frozen=True)
class _Received:
    """A tensor that `call` returns: what this rank sent for it."""

    call: Node
    sent: Node


def cancel_inverses(graph: Graph) -> int:
    """Drop every exchange that is undone; the number of calls dropped.

    Calls are dropped from a joint graph by putting `fvops::elided` into their place: AOTAutograd counts the chains.
    """
    images: dict[Node, _Image] = {}
    received: dict[Node, _Received] = {}
    stale = overwritten(graph)
    dropped = 0
    for node in list(graph.nodes):
        if is_call(node, _exchanges()):
            tensors = _received_by(node)
            if not tensors:
                continue  # sent for nothing: not ours to drop
            dims, world = arguments_of(node)[1:3], arguments_of(node)[-2:]
            undone = _Image((*reversed(dims), *world), _IDENTITY)
            if all(undone.is_like(images.get(sent)) for sent in inputs_of(node)):
                for tensor, source in tensors.items():
                    tensor.replace_all_uses_with(_before_exchange(source, images, received, tensor))
                _drop(node)
                dropped += 1
            elif stale.isdisjoint(inputs_of(node)):
                images.update(dict.fromkeys(tensors, _Image((*dims, *world), _IDENTITY)))
                received.update({tensor: _Received(node, source) for tensor, source in tensors.items()})
        else:
            image = _image_of(node, images)
            if image is not None:
                images[node] = image
    if dropped:
        dropped += _drop_unread(images, received)
    return dropped


def _exchanges() -> tuple[Any, ...]:
    ops = torch.ops.fvops
    return ops.all_to_all_4D.default, ops.all_to_all_4D_coalesced.default


def _received_by(call: Node) -> dict[Node, Node]:
    """The tensors that an exchange returns and somebody reads, with what this rank sent for each."""
    result, sent = result_of(call), inputs_of(call)
    if result is None:
        return {}
    if op_of(call) is _exchanges()[0]:
        return {result: sent[0]} if result.users else {}
    if any(item.target is not operator.getitem for item in result.users):
        return {}  # the list as such is read
    return {item: sent[index_of(item)] for item in result.users if item.users}


def drop_elided(graph: Graph) -> None:
    """Take the place holders of dropped calls out of a graph that is lowered."""
    for call in calls(graph):
        if op_of(call) is torch.ops.fvops.elided.default:
            remove(call)


def _image_of(node: Node, images: dict[Node, _Image]) -> _Image | None:
    """The image that `node` is, if it is one."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    inputs = node.all_input_nodes
    same = _viewed(node)
    operands = [same] if same is not None else [operand for operand in inputs if not _is_constant(operand)]
    if not operands or any(operand not in images for operand in operands):
        return None
    first = images[operands[0]]
    if same is not None:
        viewed = first.viewed or operands[0]
        return dataclasses.replace(first, viewed=None if same_shape(node, viewed) else viewed)
    if node.target is aten.permute.default:
        if first.viewed is not None:
            return None
        dims: Any = node.args[1]
        return _Image(first.direction, tuple(first.order[dim % 4] for dim in dims))
    if node.target not in _COPIES and not _is_elementwise(node):
        return None
    return first if all(first.is_like(images[operand]) for operand in operands) else None


def _is_elementwise(node: Node) -> bool:
    if not _is_pointwise(node) or not isinstance(node.meta["val"], torch.Tensor):
        return False
    return all(_is_single(operand) or same_shape(operand, node) for operand in node.all_input_nodes)


def _is_pointwise(node: Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    tags = node.target.tags
    pointwise = torch.Tag.pointwise in tags or node.target is torch.ops.prims.convert_element_type.default
    return pointwise and torch.Tag.nondeterministic_seeded not in tags


def _is_constant(node: Node) -> bool:
    """Is `node` a number, or a tensor with one number in every place, the same on every rank?"""
    if is_number(node):
        return True
    if node.target is aten.full.default:
        return _is_given(node.args[1])
    if node.target is aten.scalar_tensor.default:
        return _is_given(node.args[0])
    # `torch.tensor(number)`, where the number is no symbol.
    if node.op == "get_attr":
        return str(node.target).startswith("_tensor_constant") and node.meta["val"].dim() == 0
    if node.target is aten.lift_fresh_copy.default:
        return _is_constant(node.all_input_nodes[0])
    # Where a length is a symbol, torch computes Python's floats in tensors without dims.
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() or not _is_pointwise(node):
        return False
    return bool(node.all_input_nodes) and all(map(_is_constant, node.all_input_nodes))


def _is_given(number: Any) -> bool:
    return is_number(number) if isinstance(number, Node) else isinstance(number, (bool, int, float, complex))


def _is_single(node: Node) -> bool:
    """Is `node` a constant that fits beside any shape?"""
    if is_number(node):
        return True
    if not _is_constant(node):
        return False
    shape = node.meta["val"].shape
    return len(shape) == 0 or (len(shape) == 1 and isinstance(shape[0], int) and shape[0] == 1)


def _viewed(node: Node) -> Node | None:
    """The input whose elements `node` has, in their order, maybe under another shape; None if there is none."""
    whole = node.args[1] if node.target is aten.slice_scatter.default else next(iter(node.all_input_nodes), None)
    if not isinstance(whole, Node):
        return None
    # Of the same shape, a part is all of it; and what is overwritten with it has nothing of its own left.
    if node.target in (aten.expand.default, aten.slice.Tensor, aten.slice_scatter.default):
        return whole if same_shape(node, whole) else None
    return whole if node.op == "call_function" and node.target in _VIEWS else None


def _before_exchange(node: Node, images: dict[Node, _Image], received: dict[Node, _Received], like: Node) -> Node:
    """What `node` would be had nothing been exchanged, as a new contiguous tensor."""
    made: dict[Node, Node] = {}

    def replay(image: Node) -> Node:
        if image in received:
            return received[image].sent
        if _is_constant(image):
            return image if _is_single(image) else _constant_of_one(image, like)
        # A view is taken back in the end, and what is elementwise does the same until then; so it does for a copy.
        if (same := _viewed(image)) is not None or image.target in _COPIES:
            return replay(same or image.all_input_nodes[0])
        if image not in made:
            inputs = {operand: replay(operand) for operand in image.all_input_nodes}
            arguments = torch.fx.map_arg(image.args, inputs.__getitem__)
            keywords = torch.fx.map_arg(image.kwargs, inputs.__getitem__)
            values, keyword_values = torch.fx.map_arg((arguments, keywords), lambda operand: operand.meta["val"])
            value = fake_run(image.target, *values, **keyword_values)
            made[image] = new = add(like, image.target, arguments, like, value=value)
            new.kwargs = keywords
            earlier = _image_of(new, images)
            if earlier is not None:
                images[new] = earlier
        return made[image]

    source = replay(node)
    result = add(like, aten.clone.default, (source,), like, value=like.meta["val"])
    # An exchange returns a new contiguous tensor; this one may be the graph's result, and `source` its input.
    result.kwargs = {"memory_format": torch.contiguous_format}
    # With pairs inside pairs, what was exchanged was an image itself.
    if source in images:
        images[result] = images[source]
    return result


def _constant_of_one(constant: Node, like: Node) -> Node:
    """`constant`, for what has another shape; not without dims, since then it would not count in type promotion."""
    _, number = constant.args
    given = number.meta["val"] if isinstance(number, Node) else number
    value = fake_run(aten.full.default, [1], given, **constant.kwargs)
    made = add(like, aten.full.default, ([1], number), like, value=value)
    made.kwargs = constant.kwargs
    return made


def _drop(call: Node) -> None:
    note("cancel", f"{op_of(call)._opname}, undone by its inverse or the inverse itself, dropped", call)
    elide(call)


def elide(call: Node) -> None:
    """Put `fvops::elided` into the place of `call`, whose result is unread: AOTAutograd counts the chains."""
    _, token, result = insert(call, token_before(call), torch.ops.fvops.elided.default, arguments_of(call)[-2:], call)
    call.graph.erase_node(result)
    remove(call, token)


def _drop_unread(images: dict[Node, _Image], received: dict[Node, _Received]) -> int:
    """Erase the images that nobody reads any more, and drop the exchanges that nothing is left of."""
    dropped: set[Node] = set()
    for image in sorted(images, reverse=True):
        if image not in received:
            if not image.users:
                image.graph.erase_node(image)
            continue
        call = received[image].call
        if call not in dropped and not is_read(call):
            _drop(call)
            dropped.add(call)
    return len(dropped)
