"""Numbers for the collectives, which a rank writes next to its data for others to see that they are in one call."""

from __future__ import annotations

__all__ = ["OPS", "code", "name"]

OPS = (
    "nothing",
    "all_to_all",
    "all_to_all_single",
    "all_gather",
    "reduce_scatter",
    "all_reduce",
    "reduce",
    "broadcast",
    "gather",
    "send",
)
_CODES = {name: number for number, name in enumerate(OPS)}


def code(op: str) -> int:
    """The number of the collective `op`."""
    return _CODES[op]


def name(number: int) -> str:
    """The collective of `number`, for messages."""
    return OPS[number] if number < len(OPS) else f"unknown call {number}"
