"""The words with which a call is refused, for workers that hand them back instead of raising."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["refusal"]


def refusal(call: Callable[[], Any]) -> str:
    """The text of the RuntimeError that `call` raises; "NOT REFUSED" when it raises none."""
    try:
        call()
    except RuntimeError as error:
        # Not the error itself: its traceback would hold on to tensors and groups.
        return str(error)
    return "NOT REFUSED"
