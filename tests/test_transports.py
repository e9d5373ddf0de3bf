"""Every op over every transport that is not the default: gloo, and the doubles of NCCL and HCCL; with gradients.

`make test-transports` runs the whole op suite and compile_tests over them; here each op is called on a few shapes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests import cases, reference
from tests.cases import Case
from tests.doubles.build import build
from tests.harness import Ranks

TRANSPORTS = ("process_group", "nccl", "hccl")


def _cases(P: int) -> list[tuple[Case, list[Tensor | None]]]:
    """Calls, and what they must give on each rank."""
    made: list[tuple[Case, Any]] = []

    def add(name: str, shape: list[int], dtype: torch.dtype, layout: str, expected: Any, **args: Any) -> None:
        numbers = name in ("all_reduce", "reduce", "reduce_scatter")
        case = Case(name, "op", [shape] * P, dtype, [layout, "contiguous"] * 2, len(made), args, numbers)
        made.append((case, expected(case.inputs())))

    for dtype, layout in ((torch.bfloat16, "transposed"), (torch.int16, "strided"), (torch.float8_e5m2, "expanded")):
        for dims in ((2, 1), (1, 2)):
            add("all_to_all_4D", [2, 2 * P, P, 3], dtype, layout,
                lambda x, dims=dims: reference.all_to_all_4D(x, *dims),
                scatter_dim=dims[0], gather_dim=dims[1])  # fmt: skip
        add("all_gather", [3, 2], dtype, layout, lambda x: reference.all_gather(x, 1), dim=1)
        add("gather", [3, 2], dtype, layout, lambda x: reference.gather(x, P - 1, 0), dst=P - 1, dim=0)
        add("broadcast", [5], dtype, layout, lambda x: reference.broadcast(x, 1), src=1)
        add("all_to_all_single", [P, 2], dtype, layout,
            lambda x: reference.all_to_all_single(x, [[1] * P] * P),
            output_split_sizes=None, input_split_sizes=None)  # fmt: skip
    rows = [[(sender + receiver) % 3 for receiver in range(P)] for sender in range(P)]
    sends = [sum(row) for row in rows]
    splits = [
        {"output_split_sizes": [rows[other][rank] for other in range(P)], "input_split_sizes": rows[rank]}
        for rank in range(P)
    ]
    uneven = Case(
        "all_to_all_single", "op", [[n, 2] for n in sends], torch.int64, ["offset"] * 4, 7, {"by_rank": splits}
    )
    made.append((uneven, reference.all_to_all_single(uneven.inputs(), rows)))
    for dtype in (torch.float32, torch.float64, torch.int32, torch.uint8, torch.int16):
        for op in ("sum", "max") if not dtype.is_floating_point else ("sum", "avg", "max", "min", "product"):
            if op == "avg" and P == 3:
                continue  # a third is rounded: the op suite has it, with a tolerance
            add("all_reduce", [4, 3], dtype, "transposed", lambda x, op=op: reference.all_reduce(x, op), op=op)
            add("reduce_scatter", [3, 2 * P], dtype, "strided",
                lambda x, op=op: reference.reduce_scatter(x, op, 1), op=op, dim=1)  # fmt: skip
        add("reduce", [4], dtype, "offset", lambda x: reference.reduce(x, "sum", 1), op="sum", dst=1)
    add("all_reduce", [700_000], torch.float32, "contiguous", lambda x: _sum_exactly(x), op="sum")  # several pieces
    return made


def _sum_exactly(inputs: list[Tensor]) -> list[Tensor]:
    # The reference's plain indexing would take minutes; eighths add up without rounding.
    return [torch.stack([x.double() for x in inputs]).sum(0).float()] * len(inputs)


@contextmanager
def _group_over(transport: str) -> Iterator[Any]:
    """The sequence-parallel group is one over `transport` inside."""
    import fvops

    before = dict(os.environ)
    os.environ["FVOPS_TRANSPORT"] = transport
    if transport in ("nccl", "hccl"):
        os.environ[f"FVOPS_{transport.upper()}_LIBRARY"] = build(f"{transport}_double")
    P = int(os.environ["WORLD_SIZE"])
    group = fvops.initialize_sequence_parallel_group(P, group_name_suffix=f"over_{transport}")
    try:
        with fvops.parallel_state.patch_sequence_parallel_group(group):
            yield group
    finally:
        os.environ.clear()
        os.environ.update(before)
    # The world's: a test may have broken the group.
    fvops.get_world_group().barrier()
    group.destroy()


def _run_all(transport: str, calls: list[Case]) -> tuple[str, list[Any]]:
    with _group_over(transport) as group:
        results = []
        for case in calls:
            result, complaints = cases._run(case)
            assert not complaints, (case, complaints)
            results.append(result)
        return group.device_communicator.transport.name, results


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_op_gives_the_references_values(ranks: Ranks, transport: str) -> None:
    P = ranks.world_size
    calls = _cases(P)
    replies = ranks.run(_run_all, transport, [case for case, _ in calls], deadline_s=240)
    names = {"process_group": "torch.distributed (gloo)", "nccl": "nccl (pynccl)", "hccl": "hccl (pyhccl)"}
    assert {name for name, _ in replies} == {names[transport]}
    for index, (case, expected) in enumerate(calls):
        cases.agree(case, [results[index] for _, results in replies], expected)


def _messages_and_gradients(transport: str) -> tuple[list[int], Tensor, list[str]]:
    """A ring in which all send first, twice, at a size no buffer holds; and a gradient through q, k, v."""
    from fvops.debug import canonical, record_collectives

    with _group_over(transport) as group:
        P, rank = group.world_size, group.rank_in_group
        received = []
        for turn in range(2):
            group.send(torch.full((3_000_000,), 10 * turn + rank, dtype=torch.int32))
            got = group.recv((3_000_000,), torch.int32)
            received.append(int(got[0]) if bool((got == got[0]).all()) else -1)
        q, k = (torch.full((1, 2, P, 1), float(rank + 1), requires_grad=True) for _ in range(2))
        with record_collectives() as records:
            y, z = group.all_to_all_4D_coalesced([q, k])
            (y * (rank + 1) + z).sum().backward()
        return received, q.grad, [op for _, op, _ in canonical(records)]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_messages_and_gradients(ranks: Ranks, transport: str) -> None:
    P = ranks.world_size
    for rank, (received, grad, issued) in enumerate(ranks.run(_messages_and_gradients, transport)):
        assert received == [(rank - 1) % P, 10 + (rank - 1) % P]
        # Head h of this rank's rows was weighted by rank h, which has it.
        assert torch.equal(grad, torch.arange(1.0, P + 1).view(1, 1, P, 1).expand(1, 2, P, 1))
        assert issued == ["all_to_all_4D_coalesced"] * 2


def _connections(transport: str) -> tuple[list[bool], str]:
    """Is the group connected: when made, after a collective; and what a group says whose connection fails."""
    from fvops import registry

    with _group_over(transport) as group:
        comm = registry.resolve(group.unique_name, group.world_size).library_comm
        connected = [comm.comm is not None]
        group.all_reduce(torch.ones(3))
        connected.append(comm.comm is not None)
    with _group_over(transport) as group:
        comm = registry.resolve(group.unique_name, group.world_size).library_comm
        with mock.patch.object(type(comm), "_connect", return_value=None):
            with pytest.raises(RuntimeError, match="not all ranks came within"):
                group.all_reduce(torch.ones(3))
        with pytest.raises(RuntimeError) as caught:
            group.all_reduce(torch.ones(3))
    return connected, str(caught.value)


@pytest.mark.parametrize("transport", ["nccl", "hccl"])
def test_a_library_is_connected_at_the_groups_first_collective(two_ranks: Ranks, transport: str) -> None:
    for connected, refusal in two_ranks.run(_connections, transport):
        assert connected == [False, True]
        assert "this group is broken since an earlier error" in refusal
        assert "not all ranks came within" in refusal
