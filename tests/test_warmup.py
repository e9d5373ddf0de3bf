"""warmup, graph_capture and FVOPS_TRANSPORT where there is no accelerator."""

from __future__ import annotations

import os

import pytest
import torch

from tests.harness import Ranks
from tests.worlds import initialized


def _warm_up(dtype: torch.dtype) -> list[str]:
    import fvops
    from fvops.debug import record_collectives

    group = fvops.get_sp_group()
    with record_collectives() as records:
        group.warmup([(1, 4, 2 * group.world_size, 8)], dtype)
    return [record.op for record in records]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32, torch.bool, torch.complex64], ids=str)
def test_warmup_runs_every_collective_that_the_dtype_has(ranks: Ranks, dtype: torch.dtype) -> None:
    replies = ranks.run(_warm_up, dtype)
    movers = {
        "all_to_all_4D", "all_to_all_4D_coalesced", "all_to_all_single", "all_gather", "broadcast", "gather", "send",
        "recv", "barrier",
    }  # fmt: skip
    reductions = set() if dtype in (torch.bool, torch.complex64) else {"all_reduce", "reduce", "reduce_scatter"}
    for issued in replies:
        assert issued == replies[0]
        assert set(issued) == movers | reductions


def _warm_up_wrongly() -> str:
    import fvops

    group = fvops.get_sp_group()
    with pytest.raises(ValueError) as caught:
        group.warmup([(1, 4, 2 * group.world_size + 1, 8)], torch.float32)
    return str(caught.value)


def test_warmup_refuses_shapes_that_the_exchange_refuses(two_ranks: Ranks) -> None:
    assert all("dim 2 (heads) has size 5" in text for text in two_ranks.run(_warm_up_wrongly))


def _capture() -> tuple[bool, bool]:
    import fvops

    group, context = fvops.get_sp_group(), object()
    with group.graph_capture(context) as given, group.graph_capture() as none:
        return given is context, none is None


def test_graph_capture_is_no_context_on_cpu(two_ranks: Ranks) -> None:
    assert two_ranks.run(_capture) == [(True, True)] * 2


def _initialize_with(variables: dict[str, str]) -> str:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        with initialized():
            return "nothing"
    except ValueError as error:
        import fvops

        fvops.cleanup_dist_env_and_memory()
        return str(error)
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.parametrize(
    ("transport", "says"),
    [
        ("quantum", "FVOPS_TRANSPORT='quantum': must be one of auto"),
        ("nccl", "needs FVOPS_NCCL_LIBRARY"),
        ("hccl", "needs FVOPS_HCCL_LIBRARY"),
    ],
)
def test_a_transport_that_cannot_be_had_is_refused_on_every_rank(two_ranks: Ranks, transport: str, says: str) -> None:
    variables = {"FVOPS_TRANSPORT": transport, "FVOPS_NCCL_LIBRARY": "", "FVOPS_HCCL_LIBRARY": ""}
    for text in two_ranks.run(_initialize_with, variables, initialize=False):
        assert says in text
