"""Random collective programs: drawn as plain data, run by an interpreter that Dynamo unrolls.

A program is a list of steps; each takes values from a pool of 4D tensors and may add one. A drawing tracks shapes, so
that every program is valid on every rank. All Python numbers are drawn beforehand: under ``dynamic=True`` a float in a
closure that is used to index is a Dynamo bug of its own.

Programs for the compiler passes have more of what these look for. For `cancel` and `dead` they have no steps in which
one rank computes what another does not: these passes are for programs without (docs/compiler.md).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import fvops
from fvops.debug import CollectiveRecord, record_collectives
from tests.harness import init_fvops

__all__ = ["FOR_ALIKE", "FOR_ANY", "KINDS", "Step", "first_value", "programs", "run", "run_steps", "start"]

Step = tuple[Any, ...]
_LARGEST = 4096  # elements

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all_4D",
    "coalesced",
    "all_to_all_single",
    "splits",
    "broadcast",
    "broadcast_in_place",
    "gather",
    "shard",
    "ring",
    "pair",
    "barrier",
)
LOCAL = ("sin", "transpose", "slice", "mutate", "rank_branch", "add")
KINDS = COLLECTIVES + LOCAL
# Three exchanges that are ready together; an exchange and its inverse; a projection; results that nobody reads;
# projections of what was received and of what is sent, as wide as `absorb` asks for.
FOR_ANY = (
    *KINDS,
    *("three", "all_to_all_4D", "project") * 3,
    *("round_trip", "round_trip_of_lists", "unread", "project_received", "project_sent") * 2,
)
FOR_ALIKE = tuple(kind for kind in (*FOR_ANY, *("round_trip",) * 3) if kind not in ("rank_branch", "gather"))


def start(world_size: int) -> tuple[int, ...]:
    """The shape of the first value."""
    return (1, world_size * 2, world_size, 3)


@st.composite
def programs(draw: st.DrawFn, world_size: int, length: int, kinds: Sequence[str] = KINDS) -> list[Step]:
    """At most twice `length` steps ``(kind, index of the value, group, *constants)``."""
    shapes = [start(world_size)]
    steps: list[Step] = []
    for _ in range(draw(st.integers(4, length))):
        kind = draw(st.sampled_from(kinds))
        index = draw(st.integers(0, len(shapes) - 1))
        group = draw(st.sampled_from(["sp", "tp"]))
        step = _draw_step(draw, kind, index, group, shapes[index], world_size)
        if step is None:
            continue
        for _ in range(2 if draw(st.integers(0, 4)) == 0 else 1):  # now and then the same call twice
            steps.append(step)
            shape = _result_shape(step, shapes[index], world_size)
            if shape is not None:
                shapes.append(shape)
    return steps


def _draw_step(draw: st.DrawFn, kind: str, index: int, group: str, shape: tuple[int, ...], P: int) -> Step | None:
    place = draw(st.integers(0, P - 1))
    head = (kind, index, group)
    numel = shape[0] * shape[1] * shape[2] * shape[3]
    if kind == "all_reduce":
        return (*head, draw(st.sampled_from(["sum", "avg", "max", "min"])))
    if kind == "all_gather":
        return (*head, draw(st.integers(-4, 3))) if numel * P <= _LARGEST else None
    if kind in ("reduce_scatter", "shard"):
        dims = [dim for dim in range(4) if shape[dim] % P == 0]
        return (*head, draw(st.sampled_from(dims))) if dims else None
    if kind in ("all_to_all_4D", "coalesced", "three", "round_trip", "round_trip_of_lists", "unread"):
        pairs = [pair for pair in ((2, 1), (1, 2)) if shape[pair[0]] % P == 0]
        return (*head, *draw(st.sampled_from(pairs))) if pairs else None
    if kind == "project_received":
        return head if shape[1] % P == 0 else None
    if kind == "project_sent":
        return head if shape[0] * shape[1] * P * P * 2 <= _LARGEST else None
    if kind == "all_to_all_single":
        return head if shape[0] % P == 0 else None
    if kind == "splits":
        rows = [[draw(st.integers(0, 2)) for _ in range(P)] for _ in range(P)]  # from, to
        return (*head, tuple(map(tuple, rows))) if 2 * P * numel <= _LARGEST else None
    if kind in ("broadcast", "broadcast_in_place", "gather", "rank_branch"):
        return (*head, place)
    if kind == "slice":
        return head if shape[1] > 1 else None
    if kind == "pair":
        return (*head, 1 + draw(st.integers(0, P - 2)))
    return head


def _result_shape(step: Step, shape: tuple[int, ...], P: int) -> tuple[int, ...] | None:
    kind, new = step[0], list(shape)
    if kind in ("barrier", "unread"):
        return None
    if kind == "all_gather":
        new[step[3]] *= P
    elif kind in ("reduce_scatter", "shard"):
        new[step[3]] //= P
    elif kind in ("all_to_all_4D", "coalesced", "three"):
        new[step[3]] //= P
        new[step[4]] *= P
    elif kind == "project_received":
        return (shape[0], shape[1] // P, P, 3)
    elif kind == "project_sent":
        return (shape[0], shape[1] * P, P, 2)
    elif kind == "transpose":
        new[1], new[2] = new[2], new[1]
    elif kind == "slice":
        new[1] -= 1
    elif kind == "splits":
        return shape  # the received rows are summed away
    return tuple(new)


def first_value() -> Tensor:
    """The input on this rank, after making a second group of all ranks if there is none."""
    if fvops.get_tp_world_size() != fvops.get_sp_world_size():
        fvops.cleanup_dist_env_and_memory()
        init_fvops(tp_size=int(os.environ["WORLD_SIZE"]), suffix="-both")
    generator = torch.Generator().manual_seed(fvops.get_world_rank())
    # float64: a sine of a sum of sums amplifies rounding, and what is looked for is no rounding.
    return torch.rand(start(fvops.get_sp_world_size()), generator=generator, dtype=torch.float64)


def run(program: Any, x: Tensor, train: bool) -> tuple[list[Tensor], list[CollectiveRecord]]:
    """The program's results, with the input's gradient when training, and what it issued."""
    x = x.clone().requires_grad_(train)
    with record_collectives() as records, torch.set_grad_enabled(train):
        outputs = program(x)
        results = [output.detach() for output in outputs]
        differentiable = [output for output in outputs if output.requires_grad]
        if differentiable:
            # The full loss: an output that it skipped would have its backward issued by the compiled run only.
            sum(output.cos().sum() for output in differentiable).backward()
            results.append(x.grad)
    return results, records


def run_steps(steps: list[Step], x: Tensor) -> list[Tensor]:
    """Run the program on `x`; the pool of values, those that were never read again included."""
    pool = [x]
    for step in steps:
        group = fvops.get_sp_group() if step[2] == "sp" else fvops.get_tp_group()
        result = _run_step(group, step, pool[step[1]])
        if result is not None:
            pool.append(result)
    return pool


def _run_step(group: fvops.GroupCoordinator, step: Step, x: Tensor) -> Tensor | None:
    kind, place, P = step[0], group.rank_in_group, group.world_size
    if kind == "all_reduce":
        return group.all_reduce(x if step[3] in ("sum", "avg") else x.detach(), step[3])
    if kind == "all_gather":
        return group.all_gather(x, step[3])
    if kind == "reduce_scatter":
        return group.reduce_scatter(x, dim=step[3])
    if kind == "shard":
        return group.shard(x, step[3], scale_grad=True)
    if kind == "all_to_all_4D":
        return group.all_to_all_4D(x, step[3], step[4])
    if kind == "three":
        q, k, v = (group.all_to_all_4D(y, step[3], step[4]) for y in (x.sin(), x * 2, x.cos()))
        return q * k + v
    if kind == "round_trip":
        return group.all_to_all_4D(group.all_to_all_4D(x, step[3], step[4]).sin(), step[4], step[3])
    if kind == "round_trip_of_lists":
        back = [y.sin() for y in group.all_to_all_4D_coalesced([x, x.cos()[..., :2]], step[3], step[4])]
        first, second = group.all_to_all_4D_coalesced(back, step[4], step[3])
        return first + second.sum()
    if kind == "coalesced":  # one result that nobody reads
        first, _, third = group.all_to_all_4D_coalesced([x, x * 2, x[..., :1]], step[3], step[4])
        return first + third
    if kind == "unread":
        group.all_gather(group.all_to_all_4D(x.cos(), step[3], step[4]))
        return None
    if kind == "project_received":
        y = group.all_to_all_4D(x, 1, 2).flatten(2)
        return (y @ _weight(y, P * 3)).unflatten(2, (P, 3))
    if kind == "project_sent":
        y = x.flatten(2)
        return group.all_to_all_4D((y @ _weight(y, P * P * 2)).unflatten(2, (P * P, 2)), 2, 1)
    if kind == "all_to_all_single":
        return group.all_to_all_single(x)
    if kind == "splits":
        rows = step[3]
        sent = list(rows[place])
        received = [rows[other][place] for other in range(P)]
        out = group.all_to_all_single(x[:1].repeat(sum(sent), 1, 1, 1), received, sent)
        return x + out.sum()
    if kind == "broadcast":
        return torch.ops.fvops.broadcast(x, step[3], P, group.unique_name)
    if kind == "broadcast_in_place":
        buffer = x.detach() * 2
        group.broadcast(buffer, step[3])
        return buffer
    if kind == "gather":  # only one rank has a use for it
        gathered = group.gather(x.detach(), step[3], 1)
        return x if gathered is None else x + gathered.sum()
    if kind in ("ring", "pair"):
        distance = 1 if kind == "ring" else step[3]
        group.send(x.detach(), (place + distance) % P)
        return x + group.recv(x.shape, x.dtype, (place - distance) % P)
    if kind == "barrier":
        group.barrier()
        return None
    return _run_local(kind, step, x, place)


def _weight(x: Tensor, columns: int) -> Tensor:
    rows = x.shape[-1]
    # Divided: what grows at every step would make sines of large numbers, and these amplify rounding.
    return torch.linspace(-1, 1, rows * columns, dtype=x.dtype).view(rows, columns) / rows


def _run_local(kind: str, step: Step, x: Tensor, place: int) -> Tensor:
    if kind == "sin":
        return x.sin()
    if kind == "transpose":
        return x.transpose(1, 2)
    if kind == "slice":
        return x[:, 1:]
    if kind == "mutate":
        y = x + 1
        y[:, :1].mul_(0.5)
        return y
    if kind == "project":  # a kernel of its own
        return x @ _weight(x, x.shape[3])
    if kind == "rank_branch":
        return x.cos() if place == step[3] else x.sigmoid()
    return x + x.flip(1)
