"""What the ranks of a faulty run compute, right and wrong, eager or compiled, and the groups that they do it in."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.fault_table import Fault

__all__ = ["DEADLINE_S", "LONG", "Programs", "form", "group", "input_of", "warm"]

DEADLINE_S = 5.0
# Parts of it are above the size that goes through shared memory's channels: results of it are leased of the pool.
LONG = 16384
# Module globals, for the compiled programs to find the groups anew when they were created again.
group: Any = None
_other: Any = None


def _program(x: Tensor) -> Tensor:
    return group.all_gather(group.all_to_all_4D(x, 2, 1) + 1, 1)


def _another_op(x: Tensor) -> Tensor:
    return group.all_reduce(x)


def _another_order(x: Tensor) -> Tensor:
    return group.all_to_all_4D(group.all_gather(x, 1), 2, 1)


def _another_group(x: Tensor) -> Tensor:
    return _other.all_to_all_4D(x, 2, 1)


@dataclass(frozen=True)
class Programs:
    """Without arguments: `right` is everybody's, `other` of the rank whose call differs; or of long results."""

    right: Callable[[], Tensor]
    other: Callable[[], Tensor]


def input_of(places: int, length: int = 2) -> Tensor:
    """Each rank's part of a sequence, all ones."""
    return torch.ones(1, length, places, 2)


def _programs(fault: Fault, mode: str, places: int) -> Programs:
    x = input_of(places)
    other, other_x = {
        "shapes": (_program, input_of(places, 3)),
        "dtypes": (_program, x.double()),
        "ops": (_another_op, x),
        "order": (_another_order, x),
        "groups": (_another_group, x),
        "later": (_program, input_of(places, LONG)),
    }.get(fault.act, (_program, x))
    right = _program
    if mode == "compiled":
        right, other = torch.compile(right, fullgraph=True), torch.compile(other, fullgraph=True)
    return Programs(lambda: right(x), lambda: other(other_x))


def form(fault: Fault, timeout_s: float | None = None) -> None:
    """Make the group "brief", and for `fault` "other" too."""
    global group, _other
    from fvops.parallel_state import init_model_parallel_group

    everyone = [list(range(int(os.environ["WORLD_SIZE"])))]
    group = init_model_parallel_group(everyone, 0, "gloo", fault.queued, group_name="brief", timeout_s=timeout_s)
    if fault.act == "groups":
        _other = init_model_parallel_group(everyone, 0, "gloo", group_name="other", timeout_s=timeout_s)


def warm(fault: Fault, mode: str, places: int) -> Programs:
    """The programs, compiled already, over groups with a long deadline: ranks compile at their own pace.

    All ranks run, and so compile, the other one too: there it is everybody's call.
    """
    from fvops.parallel_state import get_world_group

    programs = _programs(fault, mode, places)
    form(fault)
    programs.right()
    programs.other()
    get_world_group().barrier()
    group.destroy()
    if _other is not None:
        _other.destroy()
    get_world_group().barrier()
    return programs
