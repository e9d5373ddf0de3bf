"""Initialisation and its end: what is refused, what may be repeated, and that a process can start over."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
import torch

from tests import harness
from tests.harness import Ranks
from tests.worlds import initialized, tear_down

GETTERS = {
    "get_world_group": "world",
    "get_node_group": "node",
    "get_tp_group": "tensor-parallel",
    "get_sp_group": "sequence-parallel",
    "get_dp_group": "data-parallel",
    "get_world_size": "world",
    "get_world_rank": "world",
    "get_tp_world_size": "tensor-parallel",
    "get_tp_rank": "tensor-parallel",
    "get_sp_world_size": "sequence-parallel",
    "get_sp_parallel_rank": "sequence-parallel",
    "get_dp_world_size": "data-parallel",
    "get_dp_rank": "data-parallel",
    "initialize_model_parallel": "world",
    "initialize_tensor_parallel_group": "world",
    "initialize_sequence_parallel_group": "world",
}
HELPERS = {
    "tensor_model_parallel_all_reduce": "tensor-parallel",
    "tensor_model_parallel_all_gather": "tensor-parallel",
    "sequence_model_parallel_all_to_all_4D": "sequence-parallel",
    "sequence_model_parallel_all_gather": "sequence-parallel",
    "sequence_model_parallel_shard": "sequence-parallel",
}


def _messages() -> dict[str, str]:
    """What each getter and helper says; None when it does not raise."""
    import fvops

    x = torch.ones(1, 2, 2, 1)
    calls = {name: getattr(fvops, name) for name in GETTERS}
    calls |= {name: (lambda name=name: getattr(fvops, name)(x)) for name in HELPERS}
    calls["sequence_model_parallel_all_gather_with_unpad"] = lambda: (
        fvops.sequence_model_parallel_all_gather_with_unpad(x, 1)
    )
    calls["warmup_sequence_parallel_communication"] = fvops.warmup_sequence_parallel_communication
    texts = {}
    for name, call in calls.items():
        with pytest.raises(RuntimeError) as caught:
            call()
        texts[name] = str(caught.value)
    assert not fvops.model_parallel_is_initialized()
    return texts


def _check_messages(texts: dict[str, str]) -> None:
    for name, text in texts.items():
        what = (GETTERS | HELPERS).get(name, "sequence-parallel")
        assert f"{what} group is not initialized" in text, (name, text)
        assert "call init" in text, (name, text)


def test_use_before_initialisation_says_what_to_call(two_ranks: Ranks) -> None:
    for texts in two_ranks.run(_messages, initialize=False):
        _check_messages(texts)


def _messages_after() -> dict[str, str]:
    with initialized():
        pass
    return _messages()


def test_getters_after_cleanup_say_so_too(two_ranks: Ranks) -> None:
    for texts in two_ranks.run(_messages_after, initialize=False):
        _check_messages(texts)


METHODS: dict[str, Any] = {
    "all_reduce": lambda g, x: g.all_reduce(x),
    "all_gather": lambda g, x: g.all_gather(x),
    "reduce_scatter": lambda g, x: g.reduce_scatter(x, dim=1),
    "all_to_all_4D": lambda g, x: g.all_to_all_4D(x),
    "all_to_all_single": lambda g, x: g.all_to_all_single(x[0]),
    "gather": lambda g, x: g.gather(x),
    "broadcast": lambda g, x: g.broadcast(x),
    "shard": lambda g, x: g.shard(x, 1, scale_grad=False),
    "send": lambda g, x: g.send(x),
    "recv": lambda g, x: g.recv((2,), torch.float32),
    "barrier": lambda g, x: g.barrier(),
    "broadcast_object": lambda g, x: g.broadcast_object(1),
    "broadcast_object_list": lambda g, x: g.broadcast_object_list([1]),
}


def _after_destroy(method: str, whole: bool) -> str:
    import fvops
    from fvops.debug import record_collectives

    harness.init_fvops()
    group = fvops.get_sp_group()
    P = group.world_size
    fvops.get_world_group().barrier()
    if whole:
        fvops.cleanup_dist_env_and_memory()
    else:
        group.destroy()
        group.destroy()
    with record_collectives() as records:
        try:
            METHODS[method](group, torch.ones(1, P, P, 1))
            text = "NOT REFUSED"
        except Exception as error:  # whatever it is, its words are what is compared
            text = str(error)
    assert records == []
    fvops.cleanup_dist_env_and_memory()
    return text


@pytest.mark.parametrize("whole", [False, True], ids=["group", "everything"])
@pytest.mark.parametrize("method", METHODS)
def test_use_after_destroy_names_the_group(two_ranks: Ranks, method: str, whole: bool) -> None:
    for text in two_ranks.run(_after_destroy, method, whole, initialize=False):
        assert "'sp:0'" in text
        assert "destroyed" in text


def _bad_sizes() -> list[str]:
    import fvops

    with initialized():
        fvops.destroy_model_parallel()
        P = fvops.get_world_size()
        texts = []
        for sizes in ((P + 1, 1, 1), (1, P + 1, 1), (0, 1, 1), (1, -1, 1), (1, P, P + 1), (1, 1, P + 1)):
            with pytest.raises(ValueError) as caught:
                fvops.initialize_model_parallel(*sizes)
            texts.append(str(caught.value))
            assert not fvops.model_parallel_is_initialized()
        fvops.initialize_model_parallel(P, 1, P)
        assert (fvops.get_tp_world_size(), fvops.get_dp_world_size()) == (P, P)
        return texts


def test_sizes_that_do_not_fit_the_world_are_refused(ranks: Ranks) -> None:
    P = ranks.world_size
    for tp, sp, zero, negative, dp, derived in ranks.run(_bad_sizes, initialize=False):
        assert f"tensor_model_parallel_size={P + 1}" in tp
        assert f"world size {P}" in tp
        assert f"sequence_model_parallel_size={P + 1}" in sp
        assert "tensor_model_parallel_size=0" in zero
        assert "sequence_model_parallel_size=-1" in negative
        assert f"data_parallel_size={P + 1}" in dp
        assert f"= {P}" in derived


def _twice() -> list[str]:
    import fvops

    with initialized():
        P = fvops.get_world_size()
        before = fvops.get_sp_group()
        harness.init_fvops()
        fvops.ensure_model_parallel_initialized(1, P)
        fvops.ensure_model_parallel_initialized(1, P, 1)
        rank = fvops.get_world_rank()
        fvops.init_distributed_environment(P, rank, local_rank=rank)
        assert fvops.get_sp_group() is before
        texts = []
        for call in (
            lambda: harness.init_fvops(P, 1),
            lambda: harness.init_fvops(1, 1),
            lambda: fvops.ensure_model_parallel_initialized(1, P, P),
            lambda: fvops.initialize_model_parallel(1, P),
            lambda: fvops.init_distributed_environment(P + 1, rank),
            lambda: fvops.init_distributed_environment(P, rank + 1),
        ):
            with pytest.raises(RuntimeError) as caught:
                call()
            texts.append(str(caught.value))
        assert fvops.get_sp_group() is before
        assert before.all_reduce(torch.ones(1)).item() == P
        return texts


def test_initialising_again_is_a_no_op_with_the_same_sizes_and_an_error_with_others(ranks: Ranks) -> None:
    P = ranks.world_size
    for texts in ranks.run(_twice, initialize=False):
        assert f"'sequence': {P}" in texts[0]
        assert "asked for" in texts[0]
        assert "'sequence': 1" in texts[1]
        assert "'data'" in texts[2]
        assert "initialized already" in texts[3]
        assert f"of {P + 1}" in texts[4]
        assert "initialized already" in texts[5]


def _in_any_state() -> list[bool]:
    import torch.distributed as dist

    import fvops

    told = []
    for _ in range(2):
        fvops.destroy_model_parallel()
        fvops.destroy_distributed_environment()
        fvops.cleanup_dist_env_and_memory()
    harness.init_fvops(suffix="a")
    fvops.get_world_group().barrier()
    fvops.destroy_model_parallel()
    fvops.destroy_model_parallel()
    told.append(not fvops.model_parallel_is_initialized() and fvops.get_world_size() > 0)
    fvops.initialize_model_parallel(1, fvops.get_world_size())
    told.append(fvops.get_sp_group().unique_name == "sp:0")
    fvops.get_world_group().barrier()
    # The world first, and the groups over it afterwards.
    fvops.destroy_distributed_environment()
    fvops.destroy_distributed_environment()
    fvops.destroy_model_parallel()
    told.append(not dist.is_initialized())
    harness.init_fvops(suffix="b")
    told.append(fvops.get_sp_group().all_reduce(torch.ones(1)).item() == fvops.get_world_size())
    tear_down()
    return told


def test_clean_up_in_any_state_and_start_again(ranks: Ranks) -> None:
    assert ranks.run(_in_any_state, initialize=False) == [[True] * 4] * ranks.world_size


def _clean_up_inside_a_patch() -> str:
    import fvops
    from fvops.parallel_state import patch_sequence_parallel_group

    harness.init_fvops(suffix="a")
    other = fvops.initialize_sequence_parallel_group(1, group_name_suffix="other")
    with patch_sequence_parallel_group(other):
        tear_down()
    with pytest.raises(RuntimeError, match="not initialized"):
        fvops.get_sp_group()
    harness.init_fvops(suffix="b")
    name = fvops.get_sp_group().unique_name
    tear_down()
    return name


def test_clean_up_inside_a_patch_ends_everything(two_ranks: Ranks) -> None:
    assert two_ranks.run(_clean_up_inside_a_patch, initialize=False) == ["sp:0"] * 2


def _clean_up_with_groups_left() -> list[str]:
    import fvops

    names = []
    for suffix in ("a", "b"):
        harness.init_fvops(suffix=suffix)
        names.append(fvops.initialize_sequence_parallel_group(1, group_name_suffix="vae").unique_name)
        tear_down()
    return names


def test_clean_up_ends_the_groups_of_second_models_too(two_ranks: Ranks) -> None:
    assert two_ranks.run(_clean_up_with_groups_left, initialize=False) == [["sp_vae:0"] * 2] * 2


def _over_env(port: int) -> list[float]:
    import fvops

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    totals = []
    for _ in range(3):
        fvops.maybe_init_distributed_environment_and_model_parallel(1, int(os.environ["WORLD_SIZE"]))
        totals.append(fvops.get_sp_group().all_reduce(torch.ones(1)).item())
        tear_down()
    del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    return totals


def test_three_times_over_env_with_one_port(ranks: Ranks) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    assert ranks.run(_over_env, port, initialize=False) == [[float(ranks.world_size)] * 3] * ranks.world_size


def _over_a_running_torch_distributed() -> list[bool]:
    import torch.distributed as dist

    import fvops

    P, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=os.environ["FVOPS_TEST_INIT"], rank=rank, world_size=P)
    with pytest.raises(RuntimeError, match=f"of {P}; asked for rank {rank} of {P + 1}"):
        fvops.init_distributed_environment(P + 1, rank)
    harness.init_fvops()
    total = fvops.get_sp_group().all_reduce(torch.ones(1)).item()
    dist.barrier()
    fvops.cleanup_dist_env_and_memory()
    still = dist.is_initialized()
    dist.barrier()
    dist.destroy_process_group()
    return [total == P, still]


def test_a_torch_distributed_that_others_started_is_left_running(two_ranks: Ranks) -> None:
    assert two_ranks.run(_over_a_running_torch_distributed, initialize=False) == [[True, True]] * 2


def _different_versions() -> list[str]:
    import fvops
    from fvops import agreement

    original = agreement.fingerprint
    if os.environ["RANK"] == "1":
        agreement.fingerprint = lambda: "fvops 0.0.0-other, ops 0123"
    try:
        with pytest.raises(RuntimeError) as caught:
            harness.init_fvops(suffix="a")
    finally:
        agreement.fingerprint = original
    with pytest.raises(RuntimeError, match="not initialized"):
        fvops.get_world_group()
    fvops.cleanup_dist_env_and_memory()
    harness.init_fvops(suffix="b")
    total = fvops.get_sp_group().all_reduce(torch.ones(1)).item()
    tear_down()
    return [str(caught.value), str(total)]


def test_ranks_with_different_fvops_are_refused_on_every_rank(ranks: Ranks) -> None:
    for text, total in ranks.run(_different_versions, initialize=False):
        assert "different versions of fvops" in text
        assert "rank 1: fvops 0.0.0-other" in text
        assert "rank 0: fvops" in text
        assert total == str(float(ranks.world_size))
