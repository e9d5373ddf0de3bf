"""What the passes did, told while they do it: `pass_log`. Nothing is kept unless somebody listens."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.fx import Node

__all__ = ["PassNote", "note", "pass_log"]


@dataclasses.dataclass(frozen=True)
class PassNote:
    """One change that a pass made to a graph.

    Attributes:
        name: of the pass, as in `fvops.compiler.enable`.
        what: the op that was changed, and into what.
        count: how many calls of the op, or kernels, the change is about.
        where: the user's line, "" where the compiler has lost it.
    """

    name: str
    what: str
    count: int
    where: str

    def __str__(self) -> str:
        return f"{self.name}: {self.count} x {self.what}" + (f", at {self.where}" if self.where else "")


_listening: list[list[PassNote]] = []


@contextlib.contextmanager
def pass_log() -> Iterator[list[PassNote]]:
    """Inside, the list that is handed out grows by a `PassNote` for each change that a pass makes, in any thread.

    Graphs that come out of a compile cache are not passed over again: their changes are not told.
    """
    notes: list[PassNote] = []
    _listening.append(notes)
    try:
        yield notes
    finally:
        # By identity: two empty lists are equal.
        _listening[:] = [one for one in _listening if one is not notes]


def note(name: str, what: str, at: Node, count: int = 1) -> None:
    """Tell who listens that the pass `name` changed `what`; the user's line is that of the node `at`."""
    if _listening:
        # Not before somebody listens: the report's package imports this one.
        from fvops.graph_report.user_lines import line_of_trace

        told = PassNote(name, what, count, line_of_trace(at.meta.get("stack_trace") or ""))
        for notes in _listening:
            notes.append(told)
