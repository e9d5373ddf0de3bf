"""The collectives of an FX graph: ``with_effects`` calls, chained by the token that each takes and returns.

Checked on torch 2.11 and 2.13; `compile_tests/test_internals.py` fails when the call's form changes.
"""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node

__all__ = [
    "add",
    "arguments_of",
    "bytes_sent",
    "calls",
    "fake_run",
    "index_of",
    "inputs_of",
    "insert",
    "is_call",
    "is_fixed",
    "is_read",
    "nbytes",
    "op_of",
    "read",
    "remove",
    "result_of",
    "results_of",
    "token_before",
    "token_of",
    "writes",
]

_with_effects = torch.ops.higher_order.with_effects
_BY_TOKENS = (_with_effects, torch.ops.prims._make_token.default, torch.ops.prims._sink_tokens.default)
# Meta data of a node that hold for what takes its place.
_KEPT = ("partitioner_tag", "seq_nr", "stack_trace", "nn_module_stack", "source_fn_stack", "original_aten", "from_node")


def is_call(node: Node, ops: Any = None) -> bool:
    """Is `node` a call of one of `ops`, all arguments in place, or, without `ops`, of any ordered op of fvops?"""
    if node.target is not _with_effects:
        return False
    if ops is not None:
        return op_of(node) in ops and not node.kwargs
    from fvops.compiler import ordered_ops

    return op_of(node) in ordered_ops


def calls(graph: Graph) -> list[Node]:
    """Our calls, in the order of the graph."""
    return [node for node in graph.nodes if is_call(node)]


def op_of(call: Node) -> Any:
    """The overload that `call` calls."""
    args: Any = call.args
    return args[1]


def arguments_of(call: Node) -> tuple[Any, ...]:
    """What the overload is called with."""
    args: Any = call.args
    return args[2:]


def inputs_of(exchange: Node) -> list[Node]:
    """The tensors that a 4D exchange sends, be it a single one or a list."""
    tensors: Any = arguments_of(exchange)[0]
    return list(tensors) if isinstance(tensors, (list, tuple)) else [tensors]


def bytes_sent(exchange: Node) -> Any:
    """Of all that an exchange sends, what stays on this rank included: an int, or a SymInt of symbolic sizes."""
    return sum(nbytes(tensor.meta["val"]) for tensor in inputs_of(exchange))


def nbytes(value: Any) -> Any:
    """The bytes of the fake tensor `value`: an int, or a SymInt of symbolic sizes."""
    return value.numel() * value.element_size()


def is_fixed(node: Node) -> bool:
    """Does what `node` does depend on its place beyond what it reads: random draws, writing in place, inputs, outputs?

    What is ordered by tokens does not.
    """
    if node.op != "call_function":
        return True
    if node.target in _BY_TOKENS:
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.is_impure(impure_random=False) or _draws(node)
    return isinstance(node.target, torch._ops.HigherOrderOperator) or node.is_impure()


def _draws(node: Node) -> bool:
    """Does `node` draw random numbers? Attention has the tag for its dropout, also where that is 0.

    Inductor writes a program's own attention as one such op where lengths are numbers, and not where they are symbols.
    """
    target: Any = node.target
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    for place, argument in enumerate(target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[place] if place < len(node.args) else node.kwargs.get("dropout_p", argument.default_value)
            return bool(given != 0)
    return True


def writes(node: Node) -> bool:
    """Does `node` write to a tensor that it is given? A functional graph mostly does so in `copy_` at its end only."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def token_before(call: Node) -> Node:
    """The node whose token `call` takes."""
    args: Any = call.args
    return args[0]


def index_of(item: Node) -> int:
    """Which item the node `item` reads."""
    args: Any = item.args
    return args[1]


def token_of(call: Node) -> Node | None:
    """The node that reads the call's token; None where nothing follows."""
    return _item(call, 0)


def result_of(call: Node) -> Node | None:
    """The node that reads the call's result, a tensor or a list of them; None where it is unread."""
    return _item(call, 1)


def results_of(call: Node, token: bool = False) -> list[Node]:
    """All nodes that only read values out of what `call` returns, lists and their tensors; with the token if asked."""
    found, todo = [], [item for item in call.users if token or index_of(item) != 0]
    while todo:
        item = todo.pop()
        if item.target is operator.getitem:
            found.append(item)
            todo.extend(item.users)
    return found


def is_read(call: Node) -> bool:
    """Does anything read a tensor that `call` returns?"""
    results = results_of(call)
    return any(user not in results for result in results for user in result.users)


def insert(before: Node, token: Node, op: Any, arguments: tuple[Any, ...], like: Node) -> tuple[Node, Node, Node]:
    """A new call of `op` on `token` in front of `before`; the call, its token and its result.

    Everything but the values (stack trace, forward or backward) is as for the node `like`.
    """
    call = add(before, _with_effects, (token, op, *arguments), like, value=None)
    values = torch.fx.map_arg(arguments, lambda node: node.meta["val"])
    call.meta["val"] = (token.meta["val"], fake_run(op, *values))
    out_token = add(before, operator.getitem, (call, 0), like, value=token.meta["val"])
    return call, out_token, read(before, call, 1, like)


def read(before: Node, source: Node, index: int, like: Node) -> Node:
    """A new node that reads item `index` out of `source`."""
    return add(before, operator.getitem, (source, index), like, value=source.meta["val"][index])


def add(before: Node, target: Any, arguments: tuple[Any, ...], like: Node, *, value: Any) -> Node:
    """A new node in front of `before`, with `value` as its fake value and all other meta data from `like`."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, arguments)
    node.meta = {key: entry for key, entry in like.meta.items() if key in _KEPT}
    node.meta["val"] = value
    return node


def fake_run(op: Any, *values: Any, **keywords: Any) -> Any:
    """What `op` gives for fake values; for symbols the guards it needs are those of the values."""
    mode = detect_fake_mode(values)
    with torch.no_grad(), mode if mode is not None else contextlib.nullcontext():
        return op(*values, **keywords)


def remove(call: Node, token: Node | None = None) -> None:
    """Take `call`, whose result is unread, out of the chain: what follows it gets `token`, or else what `call` got."""
    graph, old_token = call.graph, token_of(call)
    if old_token is not None:
        old_token.replace_all_uses_with(token if token is not None else token_before(call))
    for item in reversed(results_of(call, token=True)):
        graph.erase_node(item)
    graph.erase_node(call)


def _item(call: Node, index: int) -> Node | None:
    return next((user for user in call.users if user.target is operator.getitem and index_of(user) == index), None)
