"""Group coordinators: who is in which group, what a coordinator tells of itself, names, and other ways to build one."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tests.harness import Ranks
from tests.worlds import initialized


def _members(tp_size: int, sp_size: int) -> dict[str, Any]:
    import fvops

    with initialized(tp_size, sp_size):
        groups = {
            "world": fvops.get_world_group(),
            "node": fvops.get_node_group(),
            "tp": fvops.get_tp_group(),
            "sp": fvops.get_sp_group(),
            "dp": fvops.get_dp_group(),
        }
        return {
            "ranks": {name: group.ranks for name, group in groups.items()},
            "names": {name: group.unique_name for name, group in groups.items()},
            "numbers": [
                fvops.get_world_size(),
                fvops.get_world_rank(),
                fvops.get_tp_world_size(),
                fvops.get_tp_rank(),
                fvops.get_sp_world_size(),
                fvops.get_sp_parallel_rank(),
                fvops.get_dp_world_size(),
                fvops.get_dp_rank(),
            ],
        }


@pytest.mark.parametrize(
    ("world", "tp", "sp"), [(1, 1, 1), (2, 2, 2), (2, 1, 1), (3, 3, 1), (4, 2, 2), (4, 1, 2), (4, 4, 2), (4, 1, 4)]
)
def test_tp_and_sp_are_consecutive_ranks_and_dp_is_derived(world: int, tp: int, sp: int) -> None:
    for rank, reply in enumerate(Ranks.get(world).run(_members, tp, sp, initialize=False)):
        tp_start, sp_start = rank // tp * tp, rank // sp * sp
        wanted = {
            "world": list(range(world)),
            "node": list(range(world)),
            "tp": list(range(tp_start, tp_start + tp)),
            "sp": list(range(sp_start, sp_start + sp)),
            "dp": list(range(rank % sp, world, sp)),
        }
        assert reply["ranks"] == wanted
        assert reply["names"] == {name: f"{name}:0" for name in wanted}
        assert reply["numbers"] == [world, rank, tp, rank % tp, sp, rank % sp, world // sp, rank // sp]


def _attributes() -> dict[str, Any]:
    import torch.distributed as dist

    import fvops

    with initialized(2, 2):
        group = fvops.get_sp_group()
        names = ("rank", "local_rank", "ranks", "world_size", "rank_in_group", "unique_name", "use_device_communicator")
        names += ("use_custom_op_call", "first_rank", "last_rank", "is_first_rank", "is_last_rank")
        told = {name: getattr(group, name) for name in (*names, "next_rank", "prev_rank")}
        told["device"] = str(group.device)
        told["process groups"] = [
            dist.get_process_group_ranks(pg) == group.ranks for pg in (group.cpu_group, group.device_group)
        ]
        communicator = group.device_communicator
        assert communicator is not None
        names = ("unique_name", "rank", "world_size", "ranks", "global_rank", "global_world_size", "rank_in_group")
        told["communicator"] = {name: getattr(communicator, name) for name in names}
        told["communicator device"] = str(communicator.device)
        told["same groups"] = [
            communicator.cpu_group is group.cpu_group,
            communicator.device_group is group.device_group,
        ]
        told["has mq"] = [hasattr(group, "mq_broadcaster"), hasattr(fvops.get_tp_group(), "mq_broadcaster")]
        told["world communicator"] = fvops.get_world_group().device_communicator
        return told


def test_attributes_and_properties_in_a_world_of_four_in_pairs() -> None:
    for rank, told in enumerate(Ranks.get(4).run(_attributes, initialize=False)):
        first, place = rank // 2 * 2, rank % 2
        other = first + 1 - place
        assert told == {
            "rank": rank,
            "local_rank": rank,
            "ranks": [first, first + 1],
            "world_size": 2,
            "rank_in_group": place,
            "unique_name": "sp:0",
            "use_device_communicator": True,
            "use_custom_op_call": True,
            "first_rank": first,
            "last_rank": first + 1,
            "is_first_rank": place == 0,
            "is_last_rank": place == 1,
            "next_rank": other,
            "prev_rank": other,
            "device": "cpu",
            "process groups": [True, True],
            "communicator": {
                "unique_name": "sp:0",
                "rank": place,
                "world_size": 2,
                "ranks": [first, first + 1],
                "global_rank": rank,
                "global_world_size": 4,
                "rank_in_group": place,
            },
            "communicator device": "cpu",
            "same groups": [True, True],
            "has mq": [True, True],
            "world communicator": None,
        }


def _one_rank() -> list[bool]:
    import fvops

    with initialized(1, 1):
        group = fvops.get_sp_group()
        x = torch.ones(1, 2, 3, 4)
        objects = [1, "two"]
        returned = [
            group.all_reduce(x),
            group.all_gather(x),
            group.reduce_scatter(x),
            group.all_to_all_4D(x),
            group.all_to_all_4D(x, 1, 2),
            group.all_to_all_single(x),
            group.gather(x),
            group.broadcast(x),
            group.shard(x, scale_grad=True),
        ]
        assert group.broadcast_object_list(objects) is objects
        assert group.broadcast_object(objects) is objects
        group.barrier()
        for call in (lambda: group.send(x), lambda: group.recv((2,), torch.float32)):
            with pytest.raises(RuntimeError, match=r"'sp:0'.*one rank has no partner"):
                call()
        return [*(result is x for result in returned), group.device_communicator is None, group.world_size == 1]


@pytest.mark.parametrize("world", [1, 2])
def test_a_group_of_one_returns_its_input_and_has_no_partner(world: int) -> None:
    for facts in Ranks.get(world).run(_one_rank, initialize=False):
        assert all(facts), facts


def _desynchronized() -> list[str]:
    """Rank 0 has made and destroyed groups of its own under the same name before all make one."""
    import torch.distributed as dist

    import fvops

    with initialized():
        world = fvops.get_world_group()
        alone = [dist.new_group([rank], backend="gloo") for rank in range(world.world_size)][world.rank]
        pair = dist.new_group([0, 1], backend="gloo")
        made = []
        if world.rank == 0:
            made = [fvops.GroupCoordinator.from_process_group(alone, "model") for _ in range(2)]
            made[0].destroy()
        if world.rank < 2:
            made.append(fvops.GroupCoordinator.from_process_group(pair, "model"))
        everyone = fvops.init_model_parallel_group(
            [list(range(world.world_size))], world.local_rank, "gloo", group_name="model"
        )
        names = [group.unique_name for group in (*made[-1:], everyone)]
        for group in (*made, everyone):
            group.destroy()
        again = fvops.init_model_parallel_group([list(range(world.world_size))], world.local_rank, "gloo")
        names.append(again.unique_name)
        again.destroy()
        again = fvops.init_model_parallel_group(
            [list(range(world.world_size))], world.local_rank, "gloo", group_name="model"
        )
        names.append(again.unique_name)
        again.destroy()
        return names


def test_names_are_agreed_and_reused_after_different_histories(ranks: Ranks) -> None:
    replies = ranks.run(_desynchronized, initialize=False)
    # Rank 0 holds model:1 and has given up model:0, rank 1 has made none.
    assert replies[:2] == [["model:0", "model:2", "anonymous:0", "model:0"]] * 2
    assert all(names == ["model:2", "anonymous:0", "model:0"] for names in replies[2:])


def _two_of_a_name() -> list[Any]:
    import fvops

    with initialized():
        second = fvops.initialize_sequence_parallel_group(fvops.get_world_size())
        named = fvops.initialize_sequence_parallel_group(1, group_name_suffix="vae")
        tensor = fvops.initialize_tensor_parallel_group(fvops.get_world_size(), group_name_suffix="text")
        total = tensor.all_reduce(torch.ones(1)).item()
        told = [second.unique_name, named.unique_name, tensor.unique_name, named.world_size, total]
        assert fvops.get_sp_group() is not second
        for group in (second, named, tensor):
            group.destroy()
        for make in (fvops.initialize_sequence_parallel_group, fvops.initialize_tensor_parallel_group):
            with pytest.raises(ValueError, match=r"parallel_size=7 must divide the world size"):
                make(7)
        return told


def test_groups_for_a_second_model(ranks: Ranks) -> None:
    P = ranks.world_size
    assert ranks.run(_two_of_a_name, initialize=False) == [["sp:1", "sp_vae:0", "tp_text:0", 1, float(P)]] * P


def _patched() -> list[Any]:
    import fvops
    from fvops.parallel_state import patch_sequence_parallel_group, patch_tensor_parallel_group

    with initialized():
        told: list[Any] = []
        for make, patch, get in (
            (fvops.initialize_sequence_parallel_group, patch_sequence_parallel_group, fvops.get_sp_group),
            (fvops.initialize_tensor_parallel_group, patch_tensor_parallel_group, fvops.get_tp_group),
        ):
            before, other = get(), make(1, group_name_suffix="other")
            with patch(other):
                told.append(get() is other)
                with pytest.raises(RuntimeError, match="do not nest"), patch(before):
                    pass
                told.append(get() is other)
            told.append(get() is before)
            with pytest.raises(KeyError), patch(other):
                raise KeyError
            told.append(get() is before)
            with patch(other):
                told.append(get() is other)
            other.destroy()
        with patch_sequence_parallel_group(fvops.get_tp_group()), patch_tensor_parallel_group(fvops.get_sp_group()):
            told.append(fvops.get_sp_group() is fvops.get_tp_group())
        return told


def test_patches_hold_inside_only_and_do_not_nest(two_ranks: Ranks) -> None:
    assert two_ranks.run(_patched, initialize=False) == [[True] * 11] * 2


def _from_others() -> dict[str, Any]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    import fvops

    with initialized():
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ulysses"))
        by_name = fvops.GroupCoordinator.from_device_mesh(mesh, "ulysses")
        by_index = fvops.GroupCoordinator.from_device_mesh(mesh, 0, "outer")
        reversed_pg = dist.new_group([3, 1], backend="gloo")
        told: dict[str, Any] = {
            "names": [by_name.unique_name, by_index.unique_name],
            "ranks": [by_name.ranks, by_index.ranks],
            "sums": [int(group.all_reduce(torch.tensor(10**group.rank))) for group in (by_name, by_index)],
        }
        if dist.get_rank() in (1, 3):
            third = fvops.GroupCoordinator.from_process_group(reversed_pg)
            told["third"] = [third.unique_name, third.all_gather(torch.tensor([third.rank]), 0).tolist(), third.ranks]
            third.destroy()
        else:
            with pytest.raises(TypeError, match="ProcessGroup"):
                fvops.GroupCoordinator.from_process_group(reversed_pg)
        by_name.destroy()
        by_index.destroy()
        by_index.destroy()
        # The process groups are still their owner's.
        dist.barrier(mesh.get_group("ulysses"))
        return told


def test_coordinators_over_what_a_program_has() -> None:
    for rank, told in enumerate(Ranks.get(4).run(_from_others, initialize=False)):
        pair, column = [rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]
        assert told["names"] == ["ulysses:0", "outer:0"]
        assert told["ranks"] == [pair, column]
        assert told["sums"] == [sum(10**member for member in members) for members in (pair, column)]
        if rank in (1, 3):
            name, gathered, members = told["third"]
            assert name == "anonymous:0"
            # Places follow `ranks`, whichever order torch keeps.
            assert gathered == members


def _bad_group_ranks() -> list[str]:
    import fvops

    P, local_rank = fvops.get_world_size(), int(os.environ["LOCAL_RANK"])
    texts = []
    for group_ranks in ([[0, P]], [[0, 1], [1]], [[P - 1 - fvops.get_world_rank()]] if P == 2 else [[]]):
        with pytest.raises(ValueError, match="group") as caught:
            fvops.GroupCoordinator(group_ranks, local_rank, "gloo", True, group_name="bad")
        texts.append(str(caught.value))
    fvops.get_sp_group().barrier()
    return texts


def test_impossible_group_ranks_are_refused(ranks: Ranks) -> None:
    for outside, twice, nowhere in ranks.run(_bad_group_ranks):
        assert str(ranks.world_size) in outside
        assert "more than once" in twice
        assert "leave out ranks" in nowhere
        assert all("'bad'" in text for text in (outside, twice, nowhere))


def _without_communicator() -> list[Any]:
    import fvops

    with initialized():
        P = fvops.get_world_size()
        group = fvops.GroupCoordinator([list(range(P))], 0, "gloo", use_device_communicator=False, group_name="plain")
        world = fvops.get_world_group()
        told = [
            group.device_communicator is None,
            int(group.all_reduce(torch.tensor(1))),
            int(world.all_reduce(torch.tensor(2))),
            world.all_gather(torch.tensor([world.rank]), 0).tolist(),
            tuple(group.all_to_all_4D(torch.ones(1, 1, P, 2)).shape),
        ]
        group.destroy()
        return told


def test_data_methods_work_without_a_device_communicator(ranks: Ranks) -> None:
    P = ranks.world_size
    wanted = [True, P, 2 * P, list(range(P)), (1, P, 1, 2)]
    assert ranks.run(_without_communicator, initialize=False) == [wanted] * P


def _same_node() -> list[Any]:
    import fvops
    from fvops.parallel_state import get_same_node_ranks, is_the_same_node_as

    with initialized(1, 2):
        pg = fvops.get_sp_group().cpu_group
        with pytest.raises(ValueError, match="source_rank=2"):
            is_the_same_node_as(pg, 2)
        return [is_the_same_node_as(pg), is_the_same_node_as(pg, 1), get_same_node_ranks(pg, source_rank=1)]


def test_ranks_of_one_machine_share_a_node() -> None:
    for rank, told in enumerate(Ranks.get(4).run(_same_node, initialize=False)):
        assert told == [[True, True], [True, True], [rank // 2 * 2, rank // 2 * 2 + 1]]
