"""overlap: an exchange is split into a start and a wait, and what does not need its result is computed between them.

The nodes of a graph are put into a new order: what leads to the first exchange comes first, then its start, then what
leads to the next one, and so on; what reads a result stays back while anything else can be computed; then the oldest
exchange is waited for. Ordered ops keep their order, for each is handed the token of the one before it. An exchange
with nothing to compute beside it stays whole.

Memory: exchanges under way, and what is computed ahead of its turn, hold buffers longer. Both together are limited: at
the limit the graph's own order is taken up again.
"""

from __future__ import annotations

import heapq
import operator

import torch
from torch._inductor import config
from torch.fx import Graph, Node

from fvops.compiler.log import note
from fvops.compiler.sizes import at_hint
from fvops.compiler.token_chain import (
    add,
    arguments_of,
    bytes_sent,
    fake_run,
    index_of,
    inputs_of,
    insert,
    is_call,
    is_fixed,
    nbytes,
    op_of,
    read,
    remove,
    result_of,
    token_before,
)

__all__ = ["overlap_exchanges"]


def overlap_exchanges(graph: Graph, limit: int) -> int:
    """Split the exchanges beside which something can be computed; how many there were.

    Args:
        limit: bytes that may be held longer at any time, at the sizes that the graph is compiled with.
    """
    exchanges = {call: result for call in graph.nodes if (result := _splittable(call, limit)) is not None}
    if not exchanges or _captured_in_pieces(graph):
        return 0
    if config.cpp_wrapper:  # a wait for one tensor returns a list of one: see `layout.is_opened_up`
        for call in exchanges:
            note("overlap", f"{op_of(call)._opname} stays whole under cpp_wrapper", call)
        return 0
    order: list[Node] = []
    for stretch in _stretches(graph):
        order += _Stretch(stretch, exchanges, limit).order()
    place = {node: number for number, node in enumerate(order)}
    split = [
        (call, result)
        for call, result in exchanges.items()
        if any(map(_computes, order[place[call] + 1 : place[result]]))
    ]
    if split:
        *others, output = order
        for node in others:
            output.prepend(node)
        for call, result in split:
            _split(call, result)
    return len(split)


def _splittable(call: Node, limit: int) -> Node | None:
    """The result of `call`, where that is an exchange between ranks whose result is read and which fits the limit."""
    ops = torch.ops.fvops
    forms = ops.all_to_all_4D.default, ops.all_to_all_4D_coalesced.default, ops.all_to_all_4D_packed.default
    if not is_call(call, forms) or arguments_of(call)[-2] == 1:
        return None
    result = result_of(call)
    return result if result is not None and result.users and _held(call) <= limit else None


def _captured_in_pieces(graph: Graph) -> bool:
    """May a CUDA graph end inside this one? Start and wait have to be in the same capture."""
    from fvops.compiler.cudagraph_partition import HOST_OPS

    if not (config.triton.cudagraphs and config.graph_partition):
        return False
    values = [node.meta.get("val") for node in graph.nodes if node.op in ("placeholder", "call_function")]
    devices = {value.device.type for value in values if isinstance(value, torch.Tensor)}
    host_ops = any(is_call(node) and op_of(node).name() in HOST_OPS for node in graph.nodes)
    # On CPU alone nothing is captured.
    return devices != {"cpu"} and ("cpu" in devices or host_ops)


def _stretches(graph: Graph) -> list[list[Node]]:
    """The nodes, cut before and after each that nothing may pass."""
    stretches: list[list[Node]] = [[]]
    for node in graph.nodes:
        if is_fixed(node):
            stretches += [[node], []]
        else:
            stretches[-1].append(node)
    return stretches


class _Stretch:
    """Nodes between two that nothing passes, and how they are put into order."""

    def __init__(self, nodes: list[Node], exchanges: dict[Node, Node], limit: int) -> None:
        self._nodes = nodes
        self._limit = limit
        self._number = number = {node: number for number, node in enumerate(nodes)}
        self._exchanges = {call: result for call, result in exchanges.items() if call in number and result in number}
        self._missing = {node: len(self._number.keys() & node.all_input_nodes) for node in nodes}
        self._results = set(self._exchanges.values())
        # What leads to exchanges comes before all else: in backward, autograd puts gradients of weights between.
        self._turn = self._turns()
        # Nodes with all their inputs there: by turn, and within one as they were.
        self._ready: list[tuple[int, int]] = []
        # Exchanges under way, the oldest first.
        self._open: list[Node] = []
        # What was computed before its turn: bytes, by the node's number.
        self._ahead: dict[int, float] = {}
        # Bytes of both.
        self._held: float = 0
        self._first = 0
        self._order: list[Node] = []
        self._placed: set[Node] = set()

    def order(self) -> list[Node]:
        """All the nodes, each after what it reads."""
        for node in self._nodes:
            if not self._missing[node]:
                self._make_ready(node)
        while len(self._order) < len(self._nodes):
            if self._ready and not self._exceeds(self._nodes[self._ready[0][1]]):
                self._place(self._nodes[heapq.heappop(self._ready)[1]])
            elif self._open:
                self._end_oldest()
            else:
                # Nothing is under way, so the first node that is missing has all it reads: ahead of nothing.
                self._ready.remove((self._turn[self._nodes[self._first]], self._first))
                heapq.heapify(self._ready)
                self._place(self._nodes[self._first])
        return self._order

    def _turns(self) -> dict[Node, int]:
        """For each node, which exchange is the first that it leads to (or is); their number if it leads to none."""
        turns: dict[Node, int] = {}
        for turn, call in enumerate(self._exchanges):
            todo = [call]
            while todo:
                node = todo.pop()
                if node not in turns and node in self._number:
                    turns[node] = turn
                    todo.extend(node.all_input_nodes)
        return {node: turns.get(node, len(self._exchanges)) for node in self._nodes}

    def _make_ready(self, node: Node) -> None:
        # What an exchange gives is not ready before it is waited for.
        if node not in self._results:
            heapq.heappush(self._ready, (self._turn[node], self._number[node]))

    def _exceeds(self, node: Node) -> bool:
        """Would it take more memory than may be held longer to place `node` now?"""
        if node in self._exchanges:
            more = _held(node)
        else:
            more = _result_bytes(node) if self._number[node] > self._first else 0
        return more > 0 and self._held + more > self._limit

    def _end_oldest(self) -> None:
        call = self._open.pop(0)
        self._held -= _held(call)
        self._place(self._exchanges[call])

    def _place(self, node: Node) -> None:
        self._order.append(node)
        self._placed.add(node)
        if node in self._exchanges:
            self._open.append(node)
            self._held += _held(node)
        number = self._number[node]
        if number > self._first:
            self._ahead[number] = _result_bytes(node)
            self._held += self._ahead[number]
        while self._first < len(self._nodes) and self._nodes[self._first] in self._placed:
            self._held -= self._ahead.pop(self._first, 0)
            self._first += 1
        for user in node.users:
            if user in self._missing:
                self._missing[user] -= 1
                if not self._missing[user]:
                    self._make_ready(user)


def _held(call: Node) -> float:
    """Bytes that are sent and received, which a started exchange keeps."""
    return 2 * at_hint(bytes_sent(call))


def _computes(node: Node) -> bool:
    """Is `node` more than a view, a size or a part of a result?"""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    value = node.meta.get("val")
    returns = node.target._schema.returns
    aliases = any(returned.alias_info is not None for returned in returns)
    return isinstance(value, (torch.Tensor, list, tuple)) and not aliases


def _result_bytes(node: Node) -> float:
    if not _computes(node):
        return 0
    value = node.meta["val"]
    values = value if isinstance(value, (list, tuple)) else [value]
    return sum(at_hint(nbytes(one)) for one in values if isinstance(one, torch.Tensor))


def _split(call: Node, result: Node) -> None:
    """Replace `call` by a start in its place, and `result` by a wait in its."""
    ops = torch.ops.fvops
    single = op_of(call) is ops.all_to_all_4D.default
    dims, world = arguments_of(call)[1:3], arguments_of(call)[-2:]
    if op_of(call) is ops.all_to_all_4D_packed.default:
        form = "packed single" if arguments_of(call)[3] else "packed coalesced"
    else:
        form = "single" if single else "coalesced"
    arguments = (inputs_of(call), *dims, form, *world)
    _, token, ticket = insert(call, token_before(call), ops.all_to_all_4D_start.default, arguments, call)
    waited = (ticket, *arguments)
    note("overlap", f"{op_of(call)._opname} split into start and wait", call)
    values = torch.fx.map_arg(waited, lambda node: node.meta["val"])
    received = fake_run(ops.all_to_all_4D_wait.default, *values)
    wait = add(result, ops.all_to_all_4D_wait.default, waited, result, value=received)
    if single:
        result.replace_all_uses_with(read(result, wait, 0, result))
    else:
        for item in list(result.users):
            if item.target is not operator.getitem:
                raise RuntimeError(f"overlap: {item} takes the whole list that {call} returns, not a tensor of it")
            item.replace_all_uses_with(read(item, wait, index_of(item), item))
    remove(call, token)
