"""dead: an exchange whose result nobody reads is dropped.

A rank that drops an exchange which another one issues makes that one wait for ever. What is in a graph is known; what
other ranks have in theirs is not. So this is for programs of which the user says that all ranks run the same one
(docs/compiler.md), and only for ops that give a rank nothing but their result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from fvops.compiler.cancel import elide
from fvops.compiler.log import note
from fvops.compiler.token_chain import calls, is_call, is_read, op_of

__all__ = ["elide_unread"]


def elide_unread(graph: Graph) -> int:
    """Put `fvops::elided` into the place of every exchange and all_gather without readers; how many there were.

    What was computed for them alone goes too, and with it the exchanges that only that has read.
    """
    dropped = 0
    for call in reversed(calls(graph)):
        if is_call(call, _movers()) and not is_read(call):
            operands = call.all_input_nodes
            note("dead", f"{op_of(call)._opname}, which nobody reads, dropped", call)
            elide(call)
            _erase_unread(operands)
            dropped += 1
    return dropped


def _movers() -> tuple[Any, ...]:
    """Ops that move data and compute nothing."""
    ops = torch.ops.fvops
    return ops.all_to_all_4D.default, ops.all_to_all_4D_coalesced.default, ops.all_gather.default


def _erase_unread(todo: list[Node]) -> None:
    """Erase those of the nodes, and of what they are made of, that have no effect and no readers."""
    todo = list(todo)
    while todo:
        node = todo.pop()
        if node.users or node.op != "call_function" or node.graph is None or not _without_effect(node):
            continue
        todo.extend(operand for operand in node.all_input_nodes if operand not in todo)
        node.graph.erase_node(node)


def _without_effect(node: Node) -> bool:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    return not node.is_impure()
