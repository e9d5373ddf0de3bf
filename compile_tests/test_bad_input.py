"""Bad input under torch.compile: the message reaches the user, nothing is sent, and the next good call works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import ReduceOp

import fvops
from fvops.debug import record_collectives
from tests.harness import Ranks

Call = Callable[[Tensor], Any]


def _four(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(*shape, **kwargs)


# name: (what is called, on what, the type raised without fullgraph, words of the message)
def _cases() -> dict[str, tuple[Call, Tensor, type[Exception], list[str]]]:
    group = fvops.get_sp_group()
    P, place = group.world_size, group.rank_in_group
    sp = fvops.get_sp_group
    name = f"'{group.unique_name}'"
    odd = P + 1
    return {
        "heads": (lambda x: sp().all_to_all_4D(x), _four(1, P, odd, 2), ValueError, [name, "heads", str(odd), f" {P}"]),
        "rows": (lambda x: sp().all_to_all_4D(x, 1, 2), _four(1, odd, P, 2), ValueError, ["sequence", str(odd), name]),
        "dims": (lambda x: sp().all_to_all_4D(x, 2, 3), _four(1, P, P, P), ValueError, ["scatter_dim=2", "(2, 1)"]),
        "3D": (lambda x: sp().all_to_all_4D(x), _four(P, P, P), ValueError, ["4D", "3 dims"]),
        "dim": (lambda x: sp().all_gather(x, 2), _four(2, 2), ValueError, ["dim 2", "2 dims", name]),
        "shard": (lambda x: sp().shard(x, 0, scale_grad=True), _four(odd), ValueError, ["dim 0", str(odd), f" {P}"]),
        "scatter": (lambda x: sp().reduce_scatter(x, dim=0), _four(odd), ValueError, ["dim 0", str(odd), f" {P}"]),
        "single": (lambda x: sp().all_to_all_single(x), _four(odd, 2), ValueError, ["dim 0", str(odd), f" {P}"]),
        "splits": (
            lambda x: sp().all_to_all_single(x, [1] * P, [2] * P), _four(P, 2), ValueError, [str(2 * P), "add up"]
        ),
        "dst": (lambda x: sp().gather(x, P), _four(2, 2), ValueError, [f"dst={P}", f"0 to {P - 1}"]),
        "src": (lambda x: sp().broadcast(x + 1, -1), _four(2, 2), ValueError, ["src=-1", f"0 to {P - 1}"]),
        "expanded": (lambda x: sp().broadcast(x.expand(4)), _four(1), ValueError, ["share memory", name]),
        "peer": (lambda x: sp().send(x, P), _four(2, 2), ValueError, [f"dst={P}", name]),
        "itself": (lambda x: sp().send(x, place), _four(2, 2), ValueError, ["itself", f"dst={place}"]),
        "device": (lambda x: sp().all_gather(x), _four(2, 2, device="meta"), ValueError, ["meta", "cpu", name]),
        "complex": (lambda x: sp().all_reduce(x), _four(2, dtype=torch.complex64), TypeError, ["complex64", "sum"]),
        "avg": (lambda x: sp().all_reduce(x, ReduceOp.AVG), _four(2, dtype=torch.int32), TypeError, ["avg", "int32"]),
        "band": (lambda x: sp().all_reduce(x, ReduceOp.BAND), _four(2, dtype=torch.int32), ValueError, ["BAND"]),
        "grad": (lambda x: sp().gather(x * 2), _four(2, 2, requires_grad=True), RuntimeError, ["no gradient", name]),
        "max": (
            lambda x: sp().all_reduce(x, ReduceOp.MAX), _four(2, requires_grad=True), RuntimeError, ["max", "gradient"]
        ),
    }  # fmt: skip


def _refusals(fullgraph: bool, dynamic: bool) -> list[str]:
    """What did not go as it should."""
    wrong = []
    for case, (call, x, kind, words) in _cases().items():
        torch._dynamo.reset()
        compiled = torch.compile(call, backend="aot_eager", fullgraph=fullgraph, dynamic=dynamic)
        with record_collectives() as records:
            try:
                compiled(x)
                wrong.append(f"{case}: no error")
                continue
            except Exception as error:  # its type is what is tested
                text, raised = str(error), type(error)
        if not fullgraph and raised is not kind:
            wrong.append(f"{case}: {raised.__name__} instead of {kind.__name__}: {text}")
        wrong += [f"{case}: {word!r} is not in {text}" for word in words if word not in text]
        wrong += [f"{case}: sent {records}"] if records else []
    good = torch.compile(lambda x: fvops.get_sp_group().all_reduce(x), fullgraph=True, backend="aot_eager")
    if good(torch.ones(2)).tolist() != [float(fvops.get_sp_world_size())] * 2:
        wrong.append("the good call afterwards gave a wrong result")
    return wrong


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("world_size", "fullgraph"), [(2, False), (2, True), pytest.param(4, True, marks=pytest.mark.slow)]
)
def test_refusals(world_size: int, fullgraph: bool, dynamic: bool) -> None:
    for rank, wrong in enumerate(Ranks.get(world_size).run(_refusals, fullgraph, dynamic, deadline_s=180)):
        assert wrong == [], f"rank {rank}"


def _uninitialized(fullgraph: bool) -> list[tuple[str, str]]:
    calls: list[Call] = [
        lambda x: fvops.get_sp_group().all_reduce(x),
        lambda x: fvops.sequence_model_parallel_all_gather(x),
        lambda x: x * fvops.get_tp_world_size(),
        lambda x: x * fvops.get_world_rank(),
        lambda x: x * fvops.get_dp_rank(),
        lambda x: x * fvops.get_node_group().world_size,
    ]
    found = []
    for call in calls:
        torch._dynamo.reset()
        try:
            torch.compile(call, backend="aot_eager", fullgraph=fullgraph)(torch.ones(2))
            found.append(("no error", ""))
        except Exception as error:  # its type is what is tested
            found.append((type(error).__name__, str(error)))
    return found


@pytest.mark.parametrize("fullgraph", [False, True], ids=["graph_breaks", "fullgraph"])
def test_use_before_initialization(two_ranks: Ranks, fullgraph: bool) -> None:
    for found in two_ranks.run(_uninitialized, fullgraph, initialize=False):
        assert len(found) == 6
        for kind, text in found:
            assert kind == ("Unsupported" if fullgraph else "RuntimeError"), text
            assert "is not initialized; call init" in text
