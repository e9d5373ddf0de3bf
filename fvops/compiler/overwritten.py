"""Which inputs a joint graph overwrites: backward finds their new values, so nothing may be computed from them anew.

Checked on torch 2.11 and 2.13; `compile_tests/test_internals.py` fails when AOTAutograd describes graphs otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._functorch._aot_autograd.descriptors import InputMutationAOTOutput
from torch.fx import Graph, Node

__all__ = ["overwritten"]


def overwritten(graph: Graph) -> set[Node]:
    """Inputs that the program writes to, and what is computed of them without a collective between.

    AOTAutograd leaves the writing to the graph (a `copy_` at its end) or, where the input has a gradient, does it after
    the graph has run: then the new value is one of the graph's results, and only its description says whose it is.
    """
    copy_ = torch.ops.aten.copy_.default
    stale = {node.all_input_nodes[0] for node in graph.nodes if node.target is copy_}
    written = _written_later(graph)
    inputs = {node: _base(node.meta.get("desc")) for node in graph.nodes if node.op == "placeholder"}
    # An input without a name among ours may be any of them.
    anywhere = any(name not in inputs.values() for name in written)
    stale.update(node for node, name in inputs.items() if anywhere or name in written)
    if stale:
        for node in graph.nodes:
            if node.target is not torch.ops.higher_order.with_effects and not stale.isdisjoint(node.all_input_nodes):
                stale.add(node)
    return stale


def _written_later(graph: Graph) -> list[Any]:
    """The descriptions of the inputs that are overwritten once the graph has run."""
    results = map(_base, graph.output_node().meta.get("desc") or ())
    return [_base(result.mutated_input) for result in results if isinstance(result, InputMutationAOTOutput)]


def _base(description: Any) -> Any:
    """What a part of a tensor subclass (DTensor) is a part of."""
    while hasattr(description, "base"):
        description = description.base
    return description
