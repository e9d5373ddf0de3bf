"""What is broken in FastVideo 0.2.1 and must not be here: each test is named for the defect and fails on it."""

from __future__ import annotations

import inspect
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import harness
from tests.harness import Ranks
from tests.worlds import initialized, tear_down


def _use_custom_op_call() -> list[bool]:
    import fvops

    told = [group.use_custom_op_call is True for group in (fvops.get_sp_group(), fvops.get_world_group())]
    called: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        fvops.get_sp_group().all_reduce(torch.ones(2))
    return [*told, "fvops.all_reduce.default" in called]


def test_use_custom_op_call_is_true_and_the_op_is_what_runs(two_ranks: Ranks) -> None:
    assert two_ranks.run(_use_custom_op_call) == [[True, True, True]] * 2


def _keeps_its_input(way: str) -> tuple[Tensor, Tensor, bool]:
    import fvops

    group = fvops.get_sp_group()
    x = torch.full((3,), float(group.rank_in_group + 1))
    target = {"group": group, "communicator": group.device_communicator}[way]
    y = target.all_reduce(x)
    return x, y, y is x or y.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("way", ["group", "communicator"])
def test_all_reduce_does_not_write_into_its_input(ranks: Ranks, way: str) -> None:
    P = ranks.world_size
    for rank, (x, y, same) in enumerate(ranks.run(_keeps_its_input, way)):
        assert x.tolist() == [rank + 1.0] * 3
        assert y.tolist() == [P * (P + 1) / 2] * 3
        assert not same


def _has_gradient(name: str) -> list[float] | None:
    import fvops

    group = fvops.get_sp_group()
    x = torch.ones(2, 2 * group.world_size, requires_grad=True)
    y = getattr(group.device_communicator, name)(x)
    y.backward(torch.full_like(y, float(group.rank_in_group + 1)))
    return None if x.grad is None else x.grad[0].tolist()


def test_all_reduce_has_a_gradient_on_the_cpu(ranks: Ranks) -> None:
    P = ranks.world_size
    assert ranks.run(_has_gradient, "all_reduce") == [[P * (P + 1) / 2] * 2 * P] * P


def test_all_gather_has_a_gradient_on_the_cpu(ranks: Ranks) -> None:
    P = ranks.world_size
    assert ranks.run(_has_gradient, "all_gather") == [[P * (P + 1) / 2] * 2 * P] * P


def test_reduce_scatter_exists_and_has_a_gradient(ranks: Ranks) -> None:
    P = ranks.world_size
    assert ranks.run(_has_gradient, "reduce_scatter") == [[1.0 + j // 2 for j in range(2 * P)]] * P


def _base_all_gather_backward() -> list[float]:
    import fvops
    from fvops.device_communicators.base_device_communicator import DeviceCommunicatorBase

    base = DeviceCommunicatorBase(fvops.get_sp_group().cpu_group)
    x = torch.ones(3, 2, requires_grad=True)
    base.all_gather(x, dim=1).sum().backward()
    assert x.grad is not None
    return x.grad.flatten().tolist()


def test_the_base_all_gathers_backward_is_one_that_gloo_accepts(ranks: Ranks) -> None:
    P = ranks.world_size
    assert ranks.run(_base_all_gather_backward) == [[float(P)] * 6] * P


def _message_for_heads() -> str:
    import fvops

    with pytest.raises(ValueError) as caught:
        fvops.sequence_model_parallel_all_to_all_4D(torch.ones(1, 4, 5, 8))
    return str(caught.value)


def test_heads_that_do_not_divide_are_named(ranks: Ranks) -> None:
    for text in ranks.run(_message_for_heads):
        assert "dim 2 (heads) has size 5" in text
        assert f"world_size {ranks.world_size}" in text
        assert "sp:0" in text
        assert "cat" not in text


def _shard_five_rows() -> str:
    import fvops

    with pytest.raises(ValueError) as caught:
        fvops.get_sp_group().shard(torch.ones(5, 2), 0, scale_grad=False)
    return str(caught.value)


def test_shard_of_five_rows_is_refused_rather_than_cut(ranks: Ranks) -> None:
    assert all("dim 0 has size 5" in text for text in ranks.run(_shard_five_rows))


def _honoured_backend() -> list[Any]:
    import torch.distributed as dist

    import fvops

    P, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    given: dict[str, Any] = {}
    original = dist.init_process_group

    def watch(**arguments: Any) -> None:
        given.update(arguments)
        original(**arguments)

    dist.init_process_group = watch
    try:
        fvops.init_distributed_environment(
            P, rank, os.environ["FVOPS_TEST_INIT"], rank, backend="cpu:gloo", device_id=torch.device("cpu")
        )
    finally:
        dist.init_process_group = original
    group = fvops.get_world_group()
    told = [given["backend"], str(given["device_id"]), str(group.device), int(group.all_reduce(torch.tensor(1)))]
    tear_down()
    return told


def test_a_backend_and_a_device_id_that_are_given_are_honoured(two_ranks: Ranks) -> None:
    # torch takes accelerators as device_id and nothing else: the CPU is the groups' device without being handed on.
    assert two_ranks.run(_honoured_backend, initialize=False) == [["cpu:gloo", "None", "cpu", 2]] * 2


def test_an_accelerators_device_id_reaches_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    import fvops

    def stop(**arguments: Any) -> None:
        raise KeyError(arguments["device_id"])

    monkeypatch.setattr(dist, "init_process_group", stop)
    with pytest.raises(KeyError, match="cuda"):
        fvops.init_distributed_environment(1, 0, backend="nccl", device_id=torch.device("cuda", 0))


def _with_a_bound_device() -> list[Any]:
    """Groups that not every rank is in, in a gloo world that torch was given a device_id for."""
    import torch.distributed as dist

    import fvops

    P, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    fvops.init_distributed_environment(P, rank, os.environ["FVOPS_TEST_INIT"], rank, backend="gloo")
    dist.group.WORLD.bound_device_id = torch.device("cpu", 0)
    fvops.initialize_model_parallel(1, P)
    told = [str(dist.group.WORLD.bound_device_id), int(fvops.get_sp_group().all_reduce(torch.tensor(1)))]
    tear_down()
    return told


def test_groups_of_some_ranks_in_a_gloo_world_with_a_device_id(two_ranks: Ranks) -> None:
    # Seen on a GPU with torch 2.11: no attribute 'perform_nocolor_split'.
    assert two_ranks.run(_with_a_bound_device, initialize=False) == [["cpu:0", 2]] * 2


def _unknown_backend() -> str:
    import fvops

    P, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    with pytest.raises((AssertionError, ValueError, RuntimeError)) as caught:
        fvops.init_distributed_environment(P, rank, os.environ["FVOPS_TEST_INIT"], rank, backend="nosuch")
    fvops.cleanup_dist_env_and_memory()
    return str(caught.value)


def test_a_backend_that_does_not_exist_is_not_replaced(two_ranks: Ranks) -> None:
    assert all("nosuch" in text.lower() for text in two_ranks.run(_unknown_backend, initialize=False))


def _names_over_rounds() -> list[str]:
    import fvops

    names = []
    for turn in range(3):
        with initialized(suffix=f"-{turn}"):
            names.append(fvops.get_sp_group().unique_name)
    return names


def test_group_names_are_reused_after_reinitialisation(ranks: Ranks) -> None:
    assert ranks.run(_names_over_rounds, initialize=False) == [["sp:0"] * 3] * ranks.world_size


def _old_call_finds_the_new_group() -> list[float]:
    """What a compiled graph holds is the name: the op called with it works in the next life too."""
    import fvops

    totals = []
    for turn in range(2):
        with initialized(suffix=f"-{turn}"):
            totals.append(torch.ops.fvops.all_reduce(torch.ones(()), "sum", fvops.get_sp_world_size(), "sp:0").item())
    return totals


def test_an_op_with_the_old_name_is_not_stranded(ranks: Ranks) -> None:
    P = ranks.world_size
    assert ranks.run(_old_call_finds_the_new_group, initialize=False) == [[float(P)] * 2] * P


def test_the_local_device_is_cpu_without_an_accelerator() -> None:
    import fvops
    from fvops.platforms import current_platform

    if not current_platform.is_cpu():
        assert fvops.get_local_torch_device().type == current_platform.device_type
    else:
        assert fvops.get_local_torch_device() == torch.device("cpu")


def _noncontiguous_out_of_pynccl_reach() -> list[list[float]]:
    """Upstream's transport takes a pointer and a count: a transposed tensor is sent in the wrong order."""
    import fvops

    group = fvops.get_sp_group()
    x = torch.arange(6.0).reshape(2, 3).t()
    return [group.all_reduce(x).flatten().tolist(), group.all_gather(x, 0)[:3].flatten().tolist()]


def test_a_transposed_tensor_arrives_in_its_logical_order(ranks: Ranks) -> None:
    P = ranks.world_size
    wanted = [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
    assert ranks.run(_noncontiguous_out_of_pynccl_reach) == [[[P * value for value in wanted], wanted]] * P


def test_every_all_reduce_takes_an_op() -> None:
    from fvops.device_communicators.cpu_communicator import CpuCommunicator

    assert "op" in inspect.signature(CpuCommunicator.all_reduce).parameters


def _objects_are_no_pickle() -> str:
    """The bytes on the wire are decoded by a loader that builds no classes of the sender's choice."""
    import pickle

    import fvops

    group = fvops.get_sp_group()
    loads = pickle.loads
    pickle.loads = lambda *args, **kwargs: pytest.fail("pickle.loads was called")
    try:
        return str(group.broadcast_object({"a": [1, 2]} if group.rank_in_group == 0 else None))
    finally:
        pickle.loads = loads


def test_objects_do_not_cross_as_plain_pickles(two_ranks: Ranks) -> None:
    assert two_ranks.run(_objects_are_no_pickle) == ["{'a': [1, 2]}"] * 2


def _reinitialised_group() -> bool:
    import fvops

    harness.init_fvops(suffix="a")
    old = fvops.get_sp_group()
    tear_down()
    harness.init_fvops(suffix="b")
    new = fvops.get_sp_group()
    same = new.unique_name == old.unique_name and new is not old
    tear_down()
    return same


def test_the_old_coordinator_and_the_new_share_a_name(two_ranks: Ranks) -> None:
    assert two_ranks.run(_reinitialised_group, initialize=False) == [True, True]
