"""Every environment variable that fvops reads, in one table; each is read when it is asked for, never at import.

``envs.FVOPS_TIMEOUT_S`` gives the parsed value. `docs/environment.md` lists the same table for people.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["VARIABLES", "Variable", "deadline"]


@dataclass(frozen=True)
class Variable:
    """One environment variable: how to parse it, what it is when unset, and what it does."""

    parse: Callable[[str], Any]
    default: Any
    meaning: str


def _positive_seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError("must be a finite number of seconds above 0")
    return seconds


def _log_level(text: str) -> str:
    level = text.upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ValueError("must be DEBUG, INFO, WARNING or ERROR")
    return level


def _megabytes(text: str) -> int:
    megabytes = int(text)
    if megabytes <= 0:
        raise ValueError("must be a whole number of megabytes above 0")
    return megabytes


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("must be 0 or 1")
    return text == "1"


def _debug_features(text: str) -> tuple[str, ...]:
    features = tuple(part.strip() for part in text.lower().split(",") if part.strip())
    if set(features) - {"collectives"}:
        raise ValueError("must be 'collectives'")
    return features


VARIABLES: dict[str, Variable] = {
    "FVOPS_TIMEOUT_S": Variable(_positive_seconds, 600.0, "deadline of every wait for other ranks, seconds"),
    "FVOPS_WARN_AFTER_S": Variable(_positive_seconds, 60.0, "a call that lasts longer is warned about, seconds"),
    "FVOPS_DEBUG": Variable(_debug_features, (), "'collectives': ranks compare their calls before each collective"),
    "FVOPS_SHM_SEGMENT_MB": Variable(
        _megabytes, 256, "most shared memory that each rank of a group on one node uses for results, MB (2**20 bytes)"
    ),
    "FVOPS_SHM_COMPILED": Variable(
        _switch, True, "0: exchanges in shared memory go the way in Python, even where the one in C was compiled"
    ),
    "FVOPS_SYMM_SLOT_MB": Variable(
        _megabytes, 256, "largest exchange that goes one-sided through symmetric GPU memory, MB (2**20 bytes)"
    ),
    "FVOPS_MAX_OBJECT_MB": Variable(
        _megabytes, 4096, "largest object, or tensors of one dictionary, accepted from another rank, MB (2**20 bytes)"
    ),
    "FVOPS_LOG_LEVEL": Variable(
        _log_level, None, "when set, the 'fvops' logger prints to stderr at this level; unset: no handler is installed"
    ),
    "FVOPS_TRANSPORT": Variable(
        str.lower, "auto", "what carries tensors: auto, process_group (torch's), shm, symm, nccl or hccl"
    ),
    "FVOPS_NCCL_LIBRARY": Variable(str, None, "path of the NCCL library that pynccl loads; unset: it looks for one"),
    "FVOPS_HCCL_LIBRARY": Variable(str, None, "path of the HCCL library that pyhccl loads; unset: it looks for one"),
    "FVOPS_STORE_LISTEN": Variable(
        str, None, "the address of its machine on which rank 0 serves the world's store; unset: the one the ranks go to"
    ),
    "RANK": Variable(int, 0, "this process's place in the world (set by torchrun)"),
    "WORLD_SIZE": Variable(int, 1, "how many processes there are (set by torchrun)"),
    "LOCAL_RANK": Variable(int, 0, "this process's place on its node (set by torchrun)"),
}


def deadline(timeout_s: float | None) -> float:
    """`timeout_s`, or where that is None ``FVOPS_TIMEOUT_S``; ValueError unless it is finite and above 0 seconds."""
    if timeout_s is None:
        return float(__getattr__("FVOPS_TIMEOUT_S"))
    if not 0 < timeout_s < float("inf"):
        raise ValueError(f"timeout_s={timeout_s} must be a finite number of seconds above 0")
    return float(timeout_s)


def __getattr__(name: str) -> Any:
    variable = VARIABLES.get(name)
    if variable is None:
        raise AttributeError(f"fvops.envs has no variable {name!r}; it knows {', '.join(VARIABLES)}")
    text = os.environ.get(name)
    if text is None or text == "":
        return variable.default
    try:
        return variable.parse(text)
    except ValueError as error:
        raise ValueError(f"environment variable {name}={text!r}: {error}") from None
