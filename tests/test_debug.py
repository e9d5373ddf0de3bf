"""record_collectives: what an entry holds, whose threads are seen, and when nothing is recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness import Ranks


def _entry(record: Any) -> tuple[Any, ...]:
    return record.group, record.op, record.shapes, str(record.dtype), dict(record.arguments), record.nbytes


def _record_everything() -> tuple[list[tuple[Any, ...]], int]:
    import torch.distributed as dist

    import fvops
    from fvops.debug import record_collectives

    group = fvops.get_sp_group()
    rank, P = group.rank_in_group, group.world_size
    x = torch.ones(1, P, P, 2, dtype=torch.bfloat16)
    group.all_reduce(x)
    with record_collectives() as records:
        group.all_reduce(x, dist.ReduceOp.MAX)
        group.all_gather(x, -1)
        group.reduce_scatter(x, dim=1)
        group.all_to_all_4D(x)
        group.all_to_all_single(x[0].long(), [1] * P, [1] * P)
        group.broadcast(x, 1)
        group.gather(x, 1, 0)
        group.send(x[0, 0])
        group.recv((P, 2), torch.bfloat16)
        group.barrier()
        torch.ops.fvops.reduce(x, "sum", 1, P, group.unique_name)
        group.shard(x, 1, scale_grad=True)
    group.all_reduce(x)
    return [_entry(record) for record in records], rank


def test_an_entry_holds_group_op_shapes_dtype_arguments_and_bytes(ranks: Ranks) -> None:
    P = ranks.world_size
    whole, nbytes = ((1, P, P, 2),), 4 * P * P
    for entries, rank in ranks.run(_record_everything):
        bf16 = "torch.bfloat16"
        assert entries == [
            ("sp:0", "all_reduce", whole, bf16, {"op": "max"}, nbytes),
            ("sp:0", "all_gather", whole, bf16, {"dim": 3}, nbytes),
            ("sp:0", "reduce_scatter", whole, bf16, {"op": "sum", "dim": 1}, nbytes),
            ("sp:0", "all_to_all_4D", whole, bf16, {"scatter_dim": 2, "gather_dim": 1}, nbytes),
            (
                "sp:0",
                "all_to_all_single",
                ((P, P, 2),),
                "torch.int64",
                {"output_split_sizes": (1,) * P, "input_split_sizes": (1,) * P},
                16 * P * P,
            ),
            ("sp:0", "broadcast", whole, bf16, {"src": 1}, nbytes),
            ("sp:0", "gather", whole, bf16, {"dst": 1, "dim": 0}, nbytes),
            ("sp:0", "send", ((P, 2),), bf16, {"dst": (rank + 1) % P}, 4 * P),
            ("sp:0", "recv", ((P, 2),), bf16, {"src": (rank - 1) % P}, 4 * P),
            ("sp:0", "barrier", (), "None", {}, 0),
            ("sp:0", "reduce", whole, bf16, {"op": "sum", "dst": 1}, nbytes),
        ]


def _record_backward() -> list[tuple[str, Any]]:
    import fvops
    from fvops.debug import record_collectives

    group = fvops.get_sp_group()
    P = group.world_size
    x = torch.ones(1, P, P, 2, requires_grad=True)
    y = group.all_gather(group.all_to_all_4D(x), 1)
    z = group.shard(y, 1, scale_grad=False)
    with record_collectives() as records:
        z.sum().backward()
    return [(record.op, dict(record.arguments)) for record in records]


def test_backward_is_seen(ranks: Ranks) -> None:
    assert (
        ranks.run(_record_backward)
        == [
            [
                ("all_gather", {"dim": 1}),
                ("reduce_scatter", {"op": "sum", "dim": 1}),
                ("all_to_all_4D", {"scatter_dim": 1, "gather_dim": 2}),
            ]
        ]
        * ranks.world_size
    )


def _record_nested() -> list[int]:
    import fvops
    from fvops.debug import record_collectives

    group = fvops.get_sp_group()
    x = torch.ones(2)
    with record_collectives() as outer:
        group.all_reduce(x)
        with record_collectives() as inner:
            group.all_reduce(x)
        with pytest.raises(ValueError, match="dim 5"), record_collectives() as failed:
            group.all_gather(group.all_reduce(x), 5)
        group.all_reduce(x)
    group.all_reduce(x)
    with record_collectives() as nothing:
        fvops.tensor_model_parallel_all_reduce(x)
    return [len(records) for records in (outer, inner, failed, nothing)]


def test_recorders_nest_and_close(two_ranks: Ranks) -> None:
    assert two_ranks.run(_record_nested) == [[4, 1, 1, 0]] * 2


def _record_helpers() -> list[list[tuple[str, str, int]]]:
    import fvops
    from fvops.debug import canonical, record_collectives

    P = fvops.get_sp_world_size()
    with record_collectives() as records:
        fvops.warmup_sequence_parallel_communication()
        fvops.warmup_sequence_parallel_communication(torch.device("cpu"))
        piece, length = fvops.sequence_model_parallel_shard(torch.ones(1, P + 1, 2))
        fvops.sequence_model_parallel_all_gather_with_unpad(piece, length, 1)
    names = [name for _, name, _ in canonical(records)]
    assert names[: len(names) // 2] == names[len(names) // 2 : -1]
    return [list(map(list, canonical(records)))]


def test_every_rank_records_the_same_and_warmup_is_seen(ranks: Ranks) -> None:
    replies = ranks.run(_record_helpers)
    assert all(reply == replies[0] for reply in replies)
    assert {"all_to_all_4D", "all_gather", "all_reduce", "barrier"} <= {name for _, name, _ in replies[0][0]}
