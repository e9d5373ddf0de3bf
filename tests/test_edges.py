"""Corners: groups of one rank, forward-mode differentiation, a half-done shutdown, senders that fail half-way."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fvops
from fvops import node
from fvops.device_communicators.flat_transport import FlatTransport
from tests.harness import Ranks, init_fvops


def _text(call: Callable[[], Any]) -> str:
    try:
        return f"no error: {call()}"
    except Exception as error:  # its type is what is tested
        return f"{type(error).__name__}: {error}"


def _one_rank_refuses() -> list[str]:
    group = fvops.initialize_sequence_parallel_group(1, group_name_suffix="one")
    calls: list[Callable[[], Any]] = [
        lambda: group.all_reduce(torch.ones(2), "bogus"),
        lambda: group.all_reduce(torch.ones(2).to_sparse()),
        lambda: group.all_reduce(torch.ones(2, dtype=torch.complex64)),
        lambda: group.all_reduce(torch.ones(2, requires_grad=True), torch.distributed.ReduceOp.MAX),
        lambda: group.all_gather(torch.ones(2, device="meta")),
        lambda: group.all_to_all_4D(torch.ones(2, 2)),
        lambda: group.gather(torch.ones(2), 1),
    ]
    texts = [_text(call) for call in calls]
    group.destroy()
    return [*texts, _text(lambda: group.all_reduce(torch.ones(2))), _text(lambda: group.shard(torch.ones(2), 0))]


def test_a_group_of_one_refuses_what_larger_groups_refuse(two_ranks: Ranks) -> None:
    expected = ["unknown reduction 'bogus'", "layout torch.sparse_coo", "complex64", "max has no gradient", "on meta",
                "needs a 4D tensor", "dst=1 is not a place", "was destroyed", "scale_grad"]  # fmt: skip
    for texts in two_ranks.run(_one_rank_refuses):
        for text, words in zip(texts, expected, strict=True):
            assert words in text


def _jvp() -> list[str]:
    from torch.autograd import forward_ad

    group = fvops.get_sp_group()

    def dual() -> Any:
        with forward_ad.dual_level():
            return group.all_reduce(forward_ad.make_dual(torch.ones(2), torch.ones(2)))

    return [_text(dual), _text(lambda: torch.func.jvp(group.all_reduce, (torch.ones(2),), (torch.ones(2),)))]


def test_forward_mode_is_refused_rather_than_wrong(two_ranks: Ranks) -> None:
    for texts in two_ranks.run(_jvp):
        assert all("forward-mode differentiation (jvp) is not supported" in text for text in texts)


def _destroy_environment_only() -> tuple[bool, float]:
    init_fvops(suffix="-first")
    fvops.destroy_distributed_environment()
    left = fvops.model_parallel_is_initialized()
    init_fvops(suffix="-second")
    total = float(fvops.get_sp_group().all_reduce(torch.ones(1)))
    fvops.cleanup_dist_env_and_memory()
    return left, total


def test_the_environment_takes_the_model_parallel_groups_with_it(two_ranks: Ranks) -> None:
    assert two_ranks.run(_destroy_environment_only, initialize=False) == [(False, 2.0)] * 2


class _CannotBePickled:
    def __reduce__(self) -> Any:
        raise ValueError("not me")


def _bad_objects() -> list[str]:
    group = fvops.get_sp_group()
    fvops.add_safe_globals([_CannotBePickled])
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    texts = [
        _text(lambda: group.broadcast_object(_CannotBePickled() if group.rank_in_group == 0 else None)),
        _text(lambda: group.broadcast_object(deep if group.rank_in_group == 0 else None)),
    ]
    return [*texts, str(group.broadcast_object({"fine": 1} if group.rank_in_group == 0 else None))]


def test_an_object_that_fails_on_its_sender_fails_everywhere(two_ranks: Ranks) -> None:
    sender, receiver = two_ranks.run(_bad_objects)
    assert sender[0] == "ValueError: not me"
    assert "could not send its object: ValueError: not me" in receiver[0]
    assert "RecursionError" in sender[1]
    assert "RecursionError" in receiver[1]
    assert sender[2] == receiver[2] == "{'fine': 1}"


def _no_shared_memory() -> str:
    def fail(path: str, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    real = node._write
    node._write = fail
    try:
        return _text(lambda: fvops.parallel_state.get_same_node_ranks(fvops.get_world_group().cpu_group))
    finally:
        node._write = real


def test_no_room_in_shared_memory_is_said_on_every_rank(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(_no_shared_memory)
    assert "RuntimeError: place 0 cannot read back its own file" in first
    assert "No space left on device" in first
    assert "RuntimeError: place 0 cannot read back its own file" in second


def _left_out() -> str:
    return _text(lambda: fvops.init_model_parallel_group([[0]], 0, "gloo"))


def test_groups_must_cover_the_world(ranks: Ranks) -> None:
    for text in ranks.run(_left_out):
        assert text.startswith("ValueError: group_ranks of group None leave out ranks [1")


def _two_failures() -> tuple[str, str]:
    """A failure of both, and one of place 0 alone in a new group of that name: place 1 has not come to that one."""
    before = os.environ["FVOPS_TIMEOUT_S"]
    os.environ["FVOPS_TIMEOUT_S"] = "3"
    texts = []
    for alone in (False, True):
        group = fvops.initialize_sequence_parallel_group(2, group_name_suffix="twice")
        if not alone:
            transport, group.device_communicator.transport = group.device_communicator.transport, _Refusing()
            texts.append(_text(lambda group=group: group.all_reduce(torch.ones(2))))
            group.device_communicator.transport = transport
        elif group.rank_in_group == 0:
            texts.append(_text(lambda group=group: group.all_reduce(torch.ones(2))))
        fvops.get_sp_group().barrier()
        group.destroy()
    os.environ["FVOPS_TIMEOUT_S"] = before
    return texts[0], texts[-1]


class _Refusing(FlatTransport):
    device = torch.device("cpu")

    def all_reduce(self, output: torch.Tensor, input_: torch.Tensor, reduce_op: str) -> None:
        raise RuntimeError("local trouble")


def test_a_failure_does_not_count_for_the_next_one(two_ranks: Ranks) -> None:
    (first, second), (other, _) = two_ranks.run(_two_failures)
    assert "every rank of the group came to it" in first
    assert "every rank of the group came to it" in other
    assert "missing: place 1 (global rank 1)" in second


@pytest.mark.parametrize("dtype", [torch.uint64, torch.complex64, torch.float8_e8m0fnu], ids=str)
def test_dtypes_that_no_transport_reduces_are_refused(two_ranks: Ranks, dtype: torch.dtype) -> None:
    for text in two_ranks.run(_reduce, dtype):
        assert text.startswith("TypeError: fvops.all_reduce on group 'sp:0': sum of torch.")


def _reduce(dtype: torch.dtype) -> str:
    return _text(lambda: fvops.get_sp_group().all_reduce(torch.zeros(2).to(dtype)))
