"""all_to_all_4D_start and all_to_all_4D_wait: a 4D exchange in two halves; made by the compiler, not by users.

The start checks, counts, records and begins the exchange; what it returns is a *ticket*, a byte without meaning, to
which the exchange is attached. The wait takes the ticket and returns what was received. So the receiving tensors are
unknown to the compiler until they are full, and nothing can use their memory before; the tensors that are sent are
handed to the wait as well, so that theirs is in use until then.

Neither has a gradient: they are put into graphs that have been differentiated already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fvops import checks
from fvops.ops._define import define
from fvops.ops.all_to_all_4D import fake as fake_one
from fvops.registry import resolve

__all__ = ["start_op", "wait_op"]

# Of the ticket: what the wait waits for. A tensor keeps its attributes on its way through compiled code.
_STARTED = "fvops_started"


def start(
    inputs: list[Tensor], scatter_dim: int, gather_dim: int, form: str, world_size: int, group_name: str
) -> Tensor:
    started = resolve(group_name, world_size).start_all_to_all_4D(inputs, scatter_dim, gather_dim, form)
    ticket = _ticket(inputs)
    setattr(ticket, _STARTED, started)
    return ticket


def fake_start(
    inputs: list[Tensor], scatter_dim: int, gather_dim: int, form: str, world_size: int, group_name: str
) -> Tensor:
    _received(inputs, scatter_dim, gather_dim, form, world_size, group_name)
    return _ticket(inputs)


def wait(
    ticket: Tensor,
    inputs: list[Tensor],
    scatter_dim: int,
    gather_dim: int,
    form: str,
    world_size: int,
    group_name: str,
) -> list[Tensor]:
    started = getattr(ticket, _STARTED, None)
    if started is None:
        raise RuntimeError(
            f"{checks.where('all_to_all_4D_wait', group_name)}: the ticket is of no exchange under way; it must be "
            "what all_to_all_4D_start returned, and waits once"
        )
    delattr(ticket, _STARTED)
    return started.wait()


def fake_wait(
    ticket: Tensor,
    inputs: list[Tensor],
    scatter_dim: int,
    gather_dim: int,
    form: str,
    world_size: int,
    group_name: str,
) -> list[Tensor]:
    return _received(inputs, scatter_dim, gather_dim, form, world_size, group_name)


def _ticket(inputs: list[Tensor]) -> Tensor:
    return inputs[0].new_empty((1,), dtype=torch.uint8)


def _received(
    inputs: list[Tensor], scatter_dim: int, gather_dim: int, form: str, world_size: int, group_name: str
) -> list[Tensor]:
    if form.startswith("packed"):
        checks.check_all_to_all_4D_packed(group_name, inputs, scatter_dim, gather_dim, world_size)
        return [input_.new_empty(input_.shape) for input_ in inputs]
    return [fake_one(input_, scatter_dim, gather_dim, world_size, group_name) for input_ in inputs]


_ARGUMENTS = "Tensor[] inputs, int scatter_dim, int gather_dim, str form, int world_size, str group_name"

start_op: Any = define(
    f"all_to_all_4D_start({_ARGUMENTS}) -> Tensor", eager=start, fake=fake_start, differentiated=False
)
# Not ordered: it follows its start, and sends nothing.
wait_op: Any = define(
    f"all_to_all_4D_wait(Tensor ticket, {_ARGUMENTS}) -> Tensor[]",
    eager=wait,
    fake=fake_wait,
    differentiated=False,
    ordered=False,
)
