"""Does a generated kernel compute anything, or does it only move elements?

Decided on Inductor's loop body, a small fx graph: what is loaded is data, and a kernel that hands data to anything but
a store, or the choice that pads a border, computes. Arithmetic on indices is not data: a transpose has much of it.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

__all__ = ["only_moves"]


def only_moves(body: Any) -> bool:
    """True for an Inductor `LoopBody` that loads, and stores what it has loaded; False for one that computes."""
    subblocks = {name: block.graph for name, block in body.subblocks.items()}
    seen = _walk(body.root_block.graph, subblocks)
    return seen == "moves"


def _walk(graph: Graph, subblocks: dict[str, Graph]) -> str:
    """ "moves", "computes", or "neither" (only constants and indices)."""
    data: set[Node] = set()
    for node in graph.nodes:
        inputs = {source for source in node.all_input_nodes if source in data}
        if node.op == "call_module":
            inner = _walk(subblocks[node.target], subblocks) if node.target in subblocks else "neither"
            if inner == "computes":
                return "computes"
            if inner == "moves":
                data.add(node)
        elif node.op == "call_method" and node.target == "load":
            data.add(node)
        elif not inputs:
            continue
        elif node.op == "output" or node.target == "store" or (node.target == "where" and node.args[1] not in data):
            data.add(node)
        else:
            return "computes"
    return "moves" if data else "neither"
