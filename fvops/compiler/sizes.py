"""Symbolic sizes: whether they are equal, where they are read, and limits on what they make.

A trace asks some tensor for each size that it needs: often what an exchange received, which would then count as read
although nobody wants its elements. The pass that decides whether it is read has to see the same at a number and at a
symbol, or two ranks of which only one has met another length would part.

Checked on torch 2.11 and 2.13; `compile_tests/test_internals.py` fails when sympy's expressions are computed otherwise.
"""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.experimental.symbolic_shapes import (
    StrictMinMaxConstraint,
    free_symbols,
    free_unbacked_symbols,
    guard_or_false,
    statically_known_true,
)
from torch.fx.proxy import GraphAppendingTracer
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Max, Min, Mod, PythonMod
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

# What sizes are made of; torch's interpreter cannot write all else, such as rounding, into a graph of integers.
_ARITHMETIC = (sympy.Symbol, sympy.Integer, sympy.Add, sympy.Mul, FloorDiv, CleanDiv, Mod, PythonMod, Max, Min)

__all__ = ["at_hint", "fits", "is_number", "read_from_symbols", "same_shape"]


def same_shape(one: Node, other: Node) -> bool:
    """Are the shapes of two tensors equal, at all sizes that the graph is run with? As `fits`, it adds a guard."""
    shapes = one.meta["val"].shape, other.meta["val"].shape
    return len(shapes[0]) == len(shapes[1]) and all(map(_same_size, *shapes))


def _same_size(one: Any, other: Any) -> bool:
    same = one == other
    if statically_known_true(same) or statically_known_true(one != other):
        return statically_known_true(same)
    return _may_guard(same) and guard_or_false(same)


def _may_guard(value: Any) -> bool:
    """May a guard on `value` be added? Not once they are made, nor on a range that the program declares."""
    shape_env = value.node.shape_env
    return not shape_env.frozen and _declared(shape_env).isdisjoint(value.node.expr.free_symbols)


def is_number(node: Node) -> bool:
    """Is `node` a number made of sizes? Not one that was read out of a tensor, which each rank has for itself."""
    value = node.meta.get("val")
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) and not free_unbacked_symbols(value)


def fits(nbytes: Any, limit: int) -> bool:
    """Is `nbytes` at most `limit`, for all sizes that the graph is run with?

    Where that depends on a symbol, a guard is added: at sizes for which the answer is another one, the program is
    compiled anew. So ranks decide alike whatever lengths each has met before. (torch compiles a backward graph of
    symbolic sizes together with its forward graph, so that it takes guards, too.) There is no guard on sizes that are
    data, nor on a dim for which the program declared a range: these count with the most that is known of them. And
    there is none once the guards are made.
    """
    if isinstance(nbytes, int):
        return nbytes <= limit
    if statically_known_true(nbytes <= limit):
        return True
    shape_env, expression = nbytes.node.shape_env, nbytes.node.expr
    if shape_env.frozen:
        return False
    given = (free_unbacked_symbols(nbytes) | _declared(shape_env)) & expression.free_symbols
    most = {symbol: shape_env.var_to_range[symbol].upper for symbol in given}
    if not all(isinstance(size, (int, sympy.Integer)) for size in most.values()):
        return False
    return bool(shape_env.evaluate_expr(sympy.Le(expression.xreplace(most), limit), fallback_value=False))


def at_hint(number: Any) -> float:
    """`number` at the sizes that the graph is compiled with; infinite if it depends on data."""
    value = number if isinstance(number, int) else number.node.hint
    return value if isinstance(value, int) else math.inf


def _declared(shape_env: Any) -> set[Any]:
    """The symbols of which the program declares least or most values; torch refuses guards on such a dim."""
    found: set[Any] = set()
    for tracked in shape_env.tracked_fakes or ():
        constraints = getattr(tracked.symbolic_context, "constraint_sizes", None) or ()
        for size, constraint in zip(getattr(tracked.fake, "shape", ()), constraints, strict=False):
            if isinstance(constraint, StrictMinMaxConstraint):
                found |= free_symbols(size)
    return found


def read_from_symbols(graph: Graph) -> int:
    """Compute each size of a tensor made in the graph from what else the graph has; how many are read elsewhere now.

    That is the graph's own symbols, and what is rounded of them where the program rounds.
    """
    known: dict[Any, Node] = {}
    replaced = 0
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if not isinstance(value, torch.SymInt):
            continue
        expression = value.node.expr
        if node.target is torch.ops.aten.sym_size.int and node.all_input_nodes[0].op != "placeholder":
            computed = _computed(node, known)
            if computed is not None:
                node.replace_all_uses_with(computed)
                graph.erase_node(node)
                replaced += 1
                continue
        if expression.is_Symbol or not _is_arithmetic(expression):
            known.setdefault(expression, node)
    return replaced


def _computed(size: Node, known: dict[Any, Node]) -> Node | None:
    """A node in front of `size` that computes it from what is known; None where that is not enough."""
    # What is rounded stands for itself, as a symbol does.
    symbols = {part: part if part.is_Symbol else sympy.Dummy(integer=True) for part in known}
    expression = size.meta["val"].node.expr.xreplace(symbols)
    nodes = {symbol: known[part] for part, symbol in symbols.items()}
    if not expression.free_symbols or not expression.free_symbols <= nodes.keys():
        return None
    if not all(map(_is_arithmetic, sympy.preorder_traversal(expression))):
        return None
    before = set(size.graph.nodes)
    with size.graph.inserting_before(size):
        # One tracer: Max and Min refuse operands of two.
        tracer = GraphAppendingTracer(size.graph)
        proxies = {symbol: Proxy(nodes[symbol], tracer) for symbol in expression.free_symbols}
        made: Node = sympy_interp(PythonReferenceAnalysis, proxies, expression).node
    for node in size.graph.nodes:
        if node not in before:
            arguments: Any = torch.fx.map_arg(node.args, lambda operand: operand.meta["val"])
            node.meta = {**size.meta, "val": node.target(*arguments)}
    return made


def _is_arithmetic(part: Any) -> bool:
    if isinstance(part, sympy.Pow):
        return part.exp.is_Integer and part.exp > 0
    return isinstance(part, _ARITHMETIC)
