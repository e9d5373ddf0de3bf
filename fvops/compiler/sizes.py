"""Symbolic sizes: what is known of them without a guard, and where they are read.

A trace asks some tensor for each size that it needs: often what an exchange received, which would then count as read
although nobody wants its elements. The pass that decides whether it is read has to see the same at a number and at a
symbol, or two ranks of which only one has met another length would part.

Checked on torch 2.11 and 2.13; `compile_tests/test_internals.py` fails when sympy's expressions are computed otherwise.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true, sym_eq
from torch.fx.proxy import GraphAppendingTracer
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Max, Min, Mod, PythonMod
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

# What sizes are made of; torch's interpreter cannot write all else, such as rounding, into a graph.
_ARITHMETIC = (sympy.Symbol, sympy.Integer, sympy.Add, sympy.Mul, FloorDiv, CleanDiv, Mod, PythonMod, Max, Min)

__all__ = ["is_number", "read_from_symbols", "same_shape"]


def same_shape(one: Node, other: Node) -> bool:
    """Are the shapes of two tensors known to be equal? No guard is added to find out."""
    return statically_known_true(sym_eq(tuple(one.meta["val"].shape), tuple(other.meta["val"].shape)))


def is_number(node: Node) -> bool:
    """Is `node` a number made of sizes? Not one that was read out of a tensor, which each rank has for itself."""
    value = node.meta.get("val")
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) and not free_unbacked_symbols(value)


def read_from_symbols(graph: Graph) -> int:
    """Compute each size of a tensor made in the graph from the graph's own symbols; how many are read elsewhere now."""
    symbols: dict[Any, Node] = {}
    replaced = 0
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if not isinstance(value, torch.SymInt):
            continue
        if value.node.expr.is_Symbol:
            symbols.setdefault(value.node.expr, node)
        if node.target is torch.ops.aten.sym_size.int and node.all_input_nodes[0].op != "placeholder":
            computed = _computed(node, symbols)
            if computed is not None:
                node.replace_all_uses_with(computed)
                graph.erase_node(node)
                replaced += 1
    return replaced


def _computed(size: Node, symbols: dict[Any, Node]) -> Node | None:
    """A node in front of `size` that computes it from symbols; None where the graph lacks one, or for a rounding."""
    expression = size.meta["val"].node.expr
    if not expression.free_symbols or not expression.free_symbols <= symbols.keys():
        return None
    if not all(map(_is_arithmetic, sympy.preorder_traversal(expression))):
        return None
    before = set(size.graph.nodes)
    with size.graph.inserting_before(size):
        # One tracer: Max and Min refuse operands of two.
        tracer = GraphAppendingTracer(size.graph)
        known = {symbol: Proxy(symbols[symbol], tracer) for symbol in expression.free_symbols}
        made: Node = sympy_interp(PythonReferenceAnalysis, known, expression).node
    for node in size.graph.nodes:
        if node not in before:
            arguments: Any = torch.fx.map_arg(node.args, lambda operand: operand.meta["val"])
            node.meta = {**size.meta, "val": node.target(*arguments)}
    return made


def _is_arithmetic(part: Any) -> bool:
    if isinstance(part, sympy.Pow):
        return part.exp.is_Integer and part.exp > 0
    return isinstance(part, _ARITHMETIC)
