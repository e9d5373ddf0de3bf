"""Collectives that run outside of every captured graph: in code that Dynamo has left to Python."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch._guards import CompileContext

from fvops import compiler
from fvops.debug.calls import Call, fake_observers, observers
from fvops.graph_report.contents import Outside
from fvops.graph_report.user_lines import line_of_stack

__all__ = ["calls_outside_graphs"]


@contextmanager
def calls_outside_graphs(in_graph: Callable[[], bool]) -> Iterator[list[Outside]]:
    """Inside, the list that is handed out grows by an `Outside` for each such call, on real tensors or on fake ones.

    Args:
        in_graph: is a captured graph running now?
    """
    found: list[Outside] = []

    def note(op: str, group: str) -> None:
        # While something is compiled, ops run on fake tensors for their shapes.
        if not in_graph() and CompileContext.try_get() is None:
            found.append(Outside(op, group, line_of_stack(traceback.extract_stack())))

    def on_real(call: Call) -> None:
        note(call.op, call.member.group)

    def on_fake(overload: Any, args: tuple[Any, ...]) -> None:
        if overload in compiler.ordered_ops:
            note(overload._opname, args[-1])

    observers.append(on_real)
    fake_observers.append(on_fake)
    try:
        yield found
    finally:
        observers.remove(on_real)
        fake_observers.remove(on_fake)
