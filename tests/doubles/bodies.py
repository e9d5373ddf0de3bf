"""What the tests of both communicators run in their workers: communicators over a double, and lists of calls.

`which` is "nccl" or "hccl"; `path` is the double's library.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.cases import REDUCE_OPS
from tests.draws import bits, make

__all__ = ["Call", "communicator", "cpu_group", "double", "error_of", "fresh", "run_calls", "text_of"]

_cached: dict[tuple[str, str], Any] = {}


@dataclass(frozen=True)
class Call:
    """One call; rank r's input is ``make(shapes[r], dtype, "contiguous", seed + 100 * r)``.

    Attributes:
        args: "op", "dst", "src", or "rows": ``rows[j][r]`` rows go from j to r.
    """

    method: str
    shapes: Sequence[Sequence[int]]
    dtype: torch.dtype
    seed: int
    args: dict[str, Any] = field(default_factory=dict)
    numbers: bool = False

    def input(self, rank: int) -> Tensor:
        """Rank `rank`'s tensor."""
        return make(self.shapes[rank], self.dtype, "contiguous", self.seed + 100 * rank, numbers=self.numbers)

    def inputs(self) -> list[Tensor]:
        """All ranks' tensors."""
        return [self.input(rank) for rank in range(len(self.shapes))]


def cpu_group() -> Any:
    """The worker's gloo group over all ranks."""
    import fvops

    return fvops.get_sp_group().cpu_group


def kind(which: str) -> Any:
    """The communicator's class."""
    name = {"nccl": "PyNcclCommunicator", "hccl": "PyHcclCommunicator"}[which]
    return getattr(importlib.import_module(f"fvops.device_communicators.py{which}"), name)


def fresh(which: str, path: str, deadline_s: float = 60.0, group: Any = None, **kwargs: Any) -> Any:
    """A new communicator over all ranks whose calls have `deadline_s` seconds."""
    before = os.environ.get("FVOPS_TIMEOUT_S")
    os.environ["FVOPS_TIMEOUT_S"] = str(deadline_s)
    try:
        return kind(which)(cpu_group() if group is None else group, "cpu", path, **kwargs)
    finally:
        if before is None:
            del os.environ["FVOPS_TIMEOUT_S"]
        else:
            os.environ["FVOPS_TIMEOUT_S"] = before


def communicator(which: str, path: str) -> Any:
    """This worker's communicator over all ranks, for tests that do it no harm."""
    if (which, path) not in _cached:
        _cached[which, path] = fresh(which, path)
    return _cached[which, path]


def double(path: str) -> Any:
    """The double's own functions: ``double_fault(function, nth, kind, code)``, ``double_calls(function)``."""
    library = ctypes.CDLL(path)
    library.double_fault.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    library.double_fault.restype = None
    library.double_calls.argtypes = [ctypes.c_char_p]
    return library


def error_of(call: Callable[[], Any]) -> Exception | None:
    """What `call` raises."""
    try:
        call()
    except Exception as error:  # the test looks at whatever it is
        return error
    return None


def text_of(call: Callable[[], Any]) -> str:
    """Type and text of what `call` raises, empty for nothing."""
    error = error_of(call)
    return "" if error is None else f"{type(error).__name__}: {re.sub(chr(10), ' ', str(error))}"


def run_calls(which: str, path: str, calls: Sequence[Call]) -> list[Tensor | None]:
    """This rank's results."""
    comm = communicator(which, path)
    return [run_call(comm, call) for call in calls]


def run_call(comm: Any, call: Call) -> Tensor | None:
    """One call, with the input's memory looked at before and after where it must stay as it is."""
    x = call.input(comm.rank)
    before = bits(x)
    result = globals()[f"_{call.method}"](comm, x, call)
    if call.method != "broadcast":
        assert torch.equal(bits(x), before), f"{call}: the input was written"
    return result


def _all_reduce(comm: Any, x: Tensor, call: Call) -> Tensor:
    return comm.all_reduce(x, REDUCE_OPS[call.args["op"]])


def _reduce(comm: Any, x: Tensor, call: Call) -> Tensor | None:
    return comm.reduce(x, call.args["dst"], REDUCE_OPS[call.args["op"]])


def _reduce_scatter(comm: Any, x: Tensor, call: Call) -> Tensor:
    out = x.new_empty((x.size(0) // comm.world_size, *x.shape[1:]))
    comm.reduce_scatter(out, x, REDUCE_OPS[call.args["op"]])
    return out


def _all_gather(comm: Any, x: Tensor, call: Call) -> Tensor:
    out = x.new_empty((x.size(0) * comm.world_size, *x.shape[1:]))
    comm.all_gather(out, x)
    return out


def _broadcast(comm: Any, x: Tensor, call: Call) -> Tensor:
    comm.broadcast(x, call.args["src"])
    return x


def _ring(comm: Any, x: Tensor, call: Call) -> Tensor:
    """To the next rank, from the previous one, in a group."""
    out = torch.empty_like(x)
    comm.group_start()
    comm.send(x, (comm.rank + 1) % comm.world_size)
    comm.recv(out, (comm.rank - 1) % comm.world_size)
    comm.group_end()
    return out


def _chain(comm: Any, x: Tensor, call: Call) -> Tensor:
    """From rank to rank without a group: who has received sends on."""
    out = x.clone()
    if comm.rank > 0:
        comm.recv(out, comm.rank - 1)
    if comm.rank < comm.world_size - 1:
        comm.send(out, comm.rank + 1)
    return out


def _everyone(comm: Any, x: Tensor, call: Call) -> Tensor:
    """All pairs at once, oneself included, two messages each, in nested groups."""
    P = comm.world_size
    out = x.new_empty((2 * P, *x.shape))
    comm.group_start()
    for peer in range(P):
        comm.group_start()
        comm.send(x, peer)
        comm.recv(out[2 * peer], peer)
        comm.group_end()
    for peer in reversed(range(P)):
        comm.recv(out[2 * peer + 1], peer)
        comm.send(x, peer)
    comm.group_end()
    return out


def _all_to_all_single(comm: Any, x: Tensor, call: Call) -> Tensor:
    rows, rank, P = call.args["rows"], comm.rank, comm.world_size
    received = [rows[j][rank] for j in range(P)]
    out = x.new_empty((sum(received), *x.shape[1:]))
    if call.args.get("even"):
        comm.all_to_all_single(out, x)
    else:
        comm.all_to_all_single(out, x, received, rows[rank])
    return out
