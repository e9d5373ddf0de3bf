"""What ranks must agree on before a collective, and the table that shows where they do not.

A fingerprint is what one rank was about to do, as plain data. Two ranks of one collective must have the same op and
arguments, the same dtypes, and, but for `all_to_all_single`, the same shapes. A message's two ends must have as many
elements of one dtype.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fvops.debug.callers import caller
from fvops.debug.calls import Call

__all__ = ["Fingerprint", "difference", "difference_of_message", "of_call", "table"]

_SPLITS = ("input_split_sizes", "output_split_sizes")


@dataclass(frozen=True)
class Fingerprint:
    """A call as its rank announced it; `number` counts the group's calls, `where` is the caller's place."""

    group: str
    op: str
    number: int
    shapes: list[list[int]]
    dtypes: list[str]
    arguments: dict[str, Any]
    where: str

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str | bytes) -> Fingerprint:
        """RuntimeError for what no `encode` has written."""
        try:
            print_ = cls(**json.loads(text))
        except (RecursionError, TypeError, ValueError) as error:
            raise RuntimeError(f"another rank announced something unreadable: {error}") from error
        match print_:
            case Fingerprint(str(), str(), int(), list(shapes), list(dtypes), dict(), str()):
                well = all(type(dtype) is str for dtype in dtypes) and all(map(_is_shape, shapes))
            case _:
                well = False
        if not well:
            raise RuntimeError(f"another rank announced something unreadable: {str(text)[:100]!r}")
        return print_


def _is_shape(shape: Any) -> bool:
    return type(shape) is list and all(type(size) is int for size in shape)


def of_call(call: Call) -> Fingerprint:
    """The fingerprint of a call that this thread is about to issue."""
    return Fingerprint(
        group=call.member.group,
        op=call.op,
        number=call.number,
        shapes=[list(tensor.shape) for tensor in call.tensors],
        dtypes=[str(tensor.dtype).removeprefix("torch.") for tensor in call.tensors],
        arguments={name: list(value) if isinstance(value, tuple) else value for name, value in call.arguments.items()},
        where=caller(),
    )


def difference(prints: Sequence[Fingerprint]) -> str:
    """In what the calls of one collective, by place, differ; empty when they agree."""
    first = prints[0]
    for what, values in (
        ("ops", [print_.op for print_ in prints]),
        ("dtypes", [print_.dtypes for print_ in prints]),
    ):
        if any(value != values[0] for value in values):
            return f"the ranks' {what} differ"
    if first.op == "all_to_all_single":
        return _difference_of_splits(prints)
    if any(print_.shapes != first.shapes for print_ in prints):
        return "the ranks' shapes differ"
    if any(print_.arguments != first.arguments for print_ in prints):
        return "the ranks' arguments differ"
    return ""


def difference_of_message(sent: Fingerprint, wanted: Fingerprint) -> str:
    """In what a send and its receive differ; empty when what is sent fits."""
    if sent.op.removeprefix("send") != wanted.op.removeprefix("recv"):
        return f"a {wanted.op} meets a {sent.op}"
    if sent.dtypes != wanted.dtypes:
        return "the dtypes of sender and receiver differ"
    if sent.shapes and math.prod(sent.shapes[0]) != math.prod(wanted.shapes[0]):
        return "sender and receiver have another number of elements"
    return ""


def table(rows: Mapping[int, Fingerprint | str]) -> str:
    """Side by side, by global rank, what each rank was about to do; a text stands for a rank that announced nothing."""
    lines = [("rank", "group", "call", "op", "shape", "dtype", "arguments", "called from")]
    notes: dict[int, str] = {}
    for rank, row in sorted(rows.items()):
        if isinstance(row, str):
            notes[rank] = row
            continue
        arguments = ", ".join(f"{name}={value}" for name, value in row.arguments.items())
        shapes = ", ".join(str(tuple(shape)) for shape in row.shapes)
        dtypes = ", ".join(dict.fromkeys(row.dtypes))
        lines.append((str(rank), row.group, str(row.number), row.op, shapes, dtypes, arguments, row.where))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = ["  " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    texts += [f"  {str(rank).ljust(widths[0])} | {note}" for rank, note in notes.items()]
    return "\n".join(text.rstrip() for text in texts)


def _difference_of_splits(prints: Sequence[Fingerprint]) -> str:
    if any(print_.shapes[0][1:] != prints[0].shapes[0][1:] for print_ in prints):
        return "the ranks' shapes differ in another dim than the first"
    places = len(prints)
    sent, expected = ([_rows(print_, name, places) for print_ in prints] for name in _SPLITS)
    for source in range(places):
        for target in range(places):
            if sent[source][target] != expected[target][source]:
                return (
                    f"place {source} sends {sent[source][target]} rows to place {target}, "
                    f"which expects {expected[target][source]}"
                )
    return ""


def _rows(print_: Fingerprint, name: str, places: int) -> list[int]:
    splits = print_.arguments[name]
    return [print_.shapes[0][0] // places] * places if splits is None else list(splits)
