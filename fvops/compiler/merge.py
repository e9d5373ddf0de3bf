"""merge: neighbouring 4D exchanges of one group become one grouped exchange.

Two exchanges are neighbours if no other ordered op stands between them in the token chain. They merge if they are in
the same direction and neither reads, however indirectly, what the other received; nor does anything between them that
has to keep its place, such as a random draw, nor is there a write in place. The result is one
`all_to_all_4D_coalesced`, where each tensor keeps its own layout, at the place of the last of them; of exchanges that
are opened up (`layout`), one `all_to_all_4D_packed`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx import Graph, Node

from fvops.compiler.log import note
from fvops.compiler.sizes import fits
from fvops.compiler.token_chain import (
    arguments_of,
    bytes_sent,
    index_of,
    inputs_of,
    insert,
    is_call,
    is_fixed,
    op_of,
    read,
    remove,
    result_of,
    results_of,
    token_before,
    writes,
)

__all__ = ["merge_exchanges"]


@dataclasses.dataclass
class _Run:
    """Exchanges that go together, so far."""

    members: list[Node] = dataclasses.field(default_factory=list)
    # A SymInt where sizes are symbolic.
    nbytes: Any = 0
    # Everything that is computed from what a member received.
    downstream: set[Node] = dataclasses.field(default_factory=set)

    def admits(self, call: Node, limit: int) -> bool:
        if not self.members or _direction(call) != _direction(self.members[0]):
            return False
        if not self.downstream.isdisjoint(inputs_of(call)):
            return False
        return fits(self.nbytes + bytes_sent(call), limit)

    def is_passed_by(self, node: Node) -> bool:
        """Would `node`, which has to keep its place, be overtaken or left behind if one more exchange joined?

        What reads a received tensor would come behind all that stands before the last member: so a random draw behind
        later draws, and others behind a write to what they read, too. What the members send is read there as well.
        """
        if not self.members or not is_fixed(node):
            return False
        return writes(node) or not self.downstream.isdisjoint(node.all_input_nodes)

    def take(self, call: Node) -> None:
        self.members.append(call)
        self.nbytes += bytes_sent(call)
        self.downstream.update(results_of(call))


def merge_exchanges(graph: Graph, limit: int) -> int:
    """Merge what can be merged, each merged exchange of at most `limit` input bytes; the number of calls saved."""
    runs: list[_Run] = []
    open_run = _Run()
    for node in graph.nodes:
        if node.target is torch.ops.higher_order.with_effects:
            exchange = is_call(node, _exchanges())
            if not exchange or not open_run.admits(node, limit):
                runs.append(open_run)
                open_run = _Run()
            if exchange:
                open_run.take(node)
        elif open_run.is_passed_by(node):
            runs.append(open_run)
            open_run = _Run()
        elif not open_run.downstream.isdisjoint(node.all_input_nodes):
            open_run.downstream.add(node)
    saved = 0
    for run in [*runs, open_run]:
        if len(run.members) > 1:
            _merge(run.members)
            saved += len(run.members) - 1
    if saved:
        # What reads the first member's result may stand before the last member's inputs.
        stable_topological_sort(graph)
    return saved


def _exchanges() -> tuple[Any, ...]:
    ops = torch.ops.fvops
    return ops.all_to_all_4D.default, ops.all_to_all_4D_coalesced.default, ops.all_to_all_4D_packed.default


def _is_packed(call: Node) -> bool:
    return op_of(call) is torch.ops.fvops.all_to_all_4D_packed.default


def _direction(call: Node) -> tuple[Any, ...]:
    """Is the layout computed outside, dims, world size and group."""
    scatter_dim, gather_dim, *rest = arguments_of(call)[1:]
    return (_is_packed(call), scatter_dim, gather_dim, *rest[-2:])


def _merge(members: list[Node]) -> None:
    first, last = members[0], members[-1]
    inputs = [node for call in members for node in inputs_of(call)]
    packed, *dims, P, group_name = _direction(first)
    # A packed exchange of several tensors is recorded as `all_to_all_4D_coalesced`, which is what `single=False` says.
    op, arguments = _exchanges()[1], (inputs, *dims, P, group_name)
    if packed:
        op, arguments = _exchanges()[2], (inputs, *dims, False, P, group_name)
    _, token, results = insert(last, token_before(first), op, arguments, last)
    what = f"all_to_all_4D as one exchange of {len(inputs)} tensors"
    note("merge", what, last, len(members))
    place = 0
    for member in members:
        count = len(inputs_of(member))
        old = result_of(member)
        if old is not None:
            if op_of(member) is _exchanges()[0]:
                old.replace_all_uses_with(read(last, results, place, old))
            else:
                _replace_items(old, results, place, last)
        place += count
    remove(last, token)
    for member in reversed(members[:-1]):
        remove(member)


def _replace_items(old: Node, results: Node, place: int, before: Node) -> None:
    """What reads tensors out of the list `old` reads them out of `results`, from `place` on."""
    for item in list(old.users):
        item.replace_all_uses_with(read(before, results, place + index_of(item), item))
