"""Collectives that move data, against the reference, bit for bit; shapes, layouts, dtypes and entries are drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import reference
from tests.cases import ENTRIES, Case, agree, run
from tests.draws import ALL_DTYPES, bits, layouts, make, profile, shapes, storage_bits
from tests.harness import Ranks

entries = st.sampled_from(ENTRIES)
dtypes = st.sampled_from(ALL_DTYPES)
seeds = st.integers(0, 99)
# The op form takes any place as `src` or `dst`; drawn large and taken modulo P.
places = st.integers(0, 11)


def _dim(shape: tuple[int, ...], number: int) -> int:
    """A dim of `shape`, counted from either end."""
    return number % (2 * len(shape)) - len(shape)


def _scaled(shape: tuple[int, ...], dim: int, factor: int) -> list[int]:
    scaled = list(shape)
    scaled[dim] *= factor
    return scaled


@profile(22)
@given(shape=shapes, number=st.integers(0, 7), dtype=dtypes, kinds=layouts, entry=entries, seed=seeds)
def test_all_gather_concatenates(
    ranks: Ranks, shape: tuple[int, ...], number: int, dtype: torch.dtype, kinds: list[str], entry: str, seed: int
) -> None:
    P, dim = ranks.world_size, _dim(shape, number)
    case = Case("all_gather", entry, [shape] * P, dtype, kinds, seed, {"dim": dim})
    agree(case, run(P, case), reference.all_gather(case.inputs(), dim))


@profile(22)
@given(shape=shapes, number=st.integers(0, 7), dst=places, dtype=dtypes, kinds=layouts, entry=entries, seed=seeds)
def test_gather_concatenates_on_dst_only(
    ranks: Ranks,
    shape: tuple[int, ...],
    number: int,
    dst: int,
    dtype: torch.dtype,
    kinds: list[str],
    entry: str,
    seed: int,
) -> None:
    P, dim = ranks.world_size, _dim(shape, number)
    case = Case("gather", entry, [shape] * P, dtype, kinds, seed, {"dst": dst % P, "dim": dim})
    agree(case, run(P, case), reference.gather(case.inputs(), dst % P, dim))


@profile(22)
@given(
    shape=shapes,
    number=st.integers(0, 7),
    scale=st.booleans(),
    dtype=dtypes,
    kinds=layouts,
    entry=entries,
    seed=seeds,
)
def test_shard_keeps_this_ranks_slice(
    ranks: Ranks,
    shape: tuple[int, ...],
    number: int,
    scale: bool,
    dtype: torch.dtype,
    kinds: list[str],
    entry: str,
    seed: int,
) -> None:
    P, dim = ranks.world_size, _dim(shape, number)
    case = Case("shard", entry, [_scaled(shape, dim, P)] * P, dtype, kinds, seed, {"dim": dim, "scale_grad": scale})
    agree(case, run(P, case), reference.shard(case.inputs(), dim))


sizes_4D = st.tuples(*[st.sampled_from([0, 1, 2, 3])] * 4)


@profile(30)
@given(
    shape=sizes_4D,
    dims=st.sampled_from([(2, 1), (1, 2)]),
    dtype=dtypes,
    kinds=layouts,
    entry=entries,
    seed=seeds,
)
def test_all_to_all_4D_follows_the_formula(
    ranks: Ranks,
    shape: tuple[int, ...],
    dims: tuple[int, int],
    dtype: torch.dtype,
    kinds: list[str],
    entry: str,
    seed: int,
) -> None:
    P = ranks.world_size
    args = {"scatter_dim": dims[0], "gather_dim": dims[1]}
    case = Case("all_to_all_4D", entry, [_scaled(shape, dims[0], P)] * P, dtype, kinds, seed, args)
    agree(case, run(P, case), reference.all_to_all_4D(case.inputs(), *dims))


def _there_and_back(shape: list[int], dtype: torch.dtype, seed: int) -> bool:
    import fvops

    x = make(shape, dtype, "transposed", seed + fvops.get_sp_parallel_rank())
    y = fvops.sequence_model_parallel_all_to_all_4D(x)
    return torch.equal(bits(fvops.sequence_model_parallel_all_to_all_4D(y, 1, 2)), bits(x))


@profile(8)
@given(shape=sizes_4D, dtype=dtypes, seed=seeds)
def test_all_to_all_4D_there_and_back_is_the_identity(
    ranks: Ranks, shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    P = ranks.world_size
    assert all(Ranks.get(P).run(_there_and_back, _scaled(shape, 2, P), dtype, seed))


@profile(15)
@given(shape=shapes, dtype=dtypes, kinds=layouts, entry=entries, seed=seeds)
def test_all_to_all_single_with_equal_parts(
    ranks: Ranks, shape: tuple[int, ...], dtype: torch.dtype, kinds: list[str], entry: str, seed: int
) -> None:
    P = ranks.world_size
    case = Case("all_to_all_single", entry, [_scaled(shape, 0, P)] * P, dtype, kinds, seed)
    agree(case, run(P, case), reference.all_to_all_single(case.inputs(), [[shape[0]] * P] * P))


@profile(25)
@given(
    rest=st.lists(st.sampled_from([0, 1, 2, 3]), max_size=2),
    table=st.lists(st.sampled_from([0, 0, 1, 2, 5]), min_size=16, max_size=16),
    dtype=dtypes,
    kinds=layouts,
    entry=entries,
    seed=seeds,
)
def test_all_to_all_single_with_uneven_parts(
    ranks: Ranks, rest: list[int], table: list[int], dtype: torch.dtype, kinds: list[str], entry: str, seed: int
) -> None:
    P = ranks.world_size
    rows = [table[4 * j : 4 * j + P] for j in range(P)]
    by_rank = [{"output_split_sizes": [rows[j][r] for j in range(P)], "input_split_sizes": rows[r]} for r in range(P)]
    inputs = [[sum(rows[r]), *rest] for r in range(P)]
    case = Case("all_to_all_single", entry, inputs, dtype, kinds, seed, {"by_rank": by_rank})
    agree(case, run(P, case), reference.all_to_all_single(case.inputs(), rows))


@profile(20)
@given(
    shape=st.one_of(st.just(()), shapes),
    src=places,
    dtype=dtypes,
    kinds=layouts,
    entry=st.sampled_from(["op", "communicator"]),
    seed=seeds,
)
def test_out_of_place_broadcast_gives_everyone_a_copy(
    ranks: Ranks, shape: tuple[int, ...], src: int, dtype: torch.dtype, kinds: list[str], entry: str, seed: int
) -> None:
    P = ranks.world_size
    case = Case("broadcast", entry, [shape] * P, dtype, kinds, seed, {"src": src % P})
    agree(case, run(P, case), reference.broadcast(case.inputs(), src % P))


def _broadcast_in_place(
    shape: tuple[int, ...], src: int, dtype: torch.dtype, kinds: list[str], seed: int
) -> dict[str, Any]:
    import fvops

    group = fvops.get_sp_group()
    x = make(shape, dtype, kinds[group.rank_in_group], seed + 100 * group.rank_in_group)
    before, stride = storage_bits(x), x.stride()
    result = group.broadcast(x, src)
    around = storage_bits(x) != before
    return {"same": result is x and x.stride() == stride, "value": x.clone(), "bytes written": int(around.sum())}


@profile(20)
@given(
    shape=st.one_of(st.just(()), shapes),
    src=places,
    dtype=dtypes,
    kinds=st.lists(st.sampled_from(["contiguous", "transposed", "strided", "offset"]), min_size=4, max_size=4),
    seed=seeds,
)
def test_the_coordinators_broadcast_fills_its_input(
    ranks: Ranks, shape: tuple[int, ...], src: int, dtype: torch.dtype, kinds: list[str], seed: int
) -> None:
    P, src = ranks.world_size, src % ranks.world_size
    replies = Ranks.get(P).run(_broadcast_in_place, shape, src, dtype, kinds, seed)
    wanted = make(shape, dtype, kinds[src], seed + 100 * src)
    for reply in replies:
        assert reply["same"], "broadcast returns the very tensor that it was given"
        assert torch.equal(bits(reply["value"]), bits(wanted))
        assert reply["bytes written"] <= wanted.numel() * wanted.element_size(), "wrote beside the tensor"
    assert replies[src]["bytes written"] == 0


def _pass_on(
    shape: tuple[int, ...], dtype: torch.dtype, kinds: list[str], seed: int, step: int, entry: str
) -> tuple[torch.Tensor, list[str]]:
    import fvops

    group = fvops.get_sp_group()
    rank, P, name = group.rank_in_group, group.world_size, group.unique_name
    x = make(shape, dtype, kinds[rank], seed + 100 * rank)
    before = storage_bits(x)
    dst, src = (rank + step) % P, (rank - step) % P
    if entry == "op":
        torch.ops.fvops.send(x, dst, P, name)
        y = torch.ops.fvops.recv(shape, dtype, torch.device("cpu"), src, P, name)
    else:
        target = group if entry == "coordinator" else group.device_communicator
        target.send(x, *() if step == 1 else (dst,))
        y = target.recv(torch.Size(shape), dtype, *() if step == 1 else (src,))
    complaints = [] if torch.equal(storage_bits(x), before) else ["send wrote its input"]
    if y.stride() != torch.empty(shape).stride() or y.dtype != dtype:
        complaints.append(f"recv gave strides {y.stride()}, {y.dtype}")
    return y, complaints


@profile(20)
@given(
    shape=st.one_of(st.just(()), shapes),
    dtype=dtypes,
    kinds=layouts,
    step=st.integers(1, 3),
    entry=entries,
    seed=seeds,
)
def test_send_and_recv_pass_a_tensor_on(
    ranks: Ranks, shape: tuple[int, ...], dtype: torch.dtype, kinds: list[str], step: int, entry: str, seed: int
) -> None:
    P = ranks.world_size
    step = 1 + (step - 1) % (P - 1)
    replies = Ranks.get(P).run(_pass_on, shape, dtype, kinds, seed, step, entry)
    for rank, (received, complaints) in enumerate(replies):
        src = (rank - step) % P
        assert not complaints
        assert torch.equal(bits(received), bits(make(shape, dtype, kinds[src], seed + 100 * src)))


def _odd_strides(dtype: torch.dtype) -> list[tuple[int, ...]]:
    import fvops

    group = fvops.get_sp_group()
    P = group.world_size
    x = torch.zeros(1, P, P, 1, dtype=dtype)
    results = [group.all_to_all_4D(x), group.all_to_all_4D(x, 1, 2), group.all_gather(x, 0), group.all_gather(x, 3)]
    results += [group.reduce_scatter(x, dim=1), group.shard(x, 2, scale_grad=False), group.all_to_all_single(x[0])]
    return [result.stride() for result in results if result.stride() != torch.empty(result.shape).stride()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_results_of_size_one_dims_have_ordinary_strides(ranks: Ranks, dtype: torch.dtype) -> None:
    assert ranks.run(_odd_strides, dtype) == [[]] * ranks.world_size


@pytest.mark.parametrize("numel", [1, 0], ids=["one", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.complex64], ids=str)
@pytest.mark.parametrize("op", ["all_gather", "gather", "all_to_all_single", "broadcast"])
def test_a_single_element_may_have_any_stride(ranks: Ranks, op: str, dtype: torch.dtype, numel: int) -> None:
    """``x[::2]`` of two elements has stride 2 and counts as contiguous all the same."""
    P = ranks.world_size
    entry, args = "coordinator", {}
    rows = [[numel if r == (j + 1) % P else 0 for r in range(P)] for j in range(P)]
    if op == "all_to_all_single":
        by_rank = [{"output_split_sizes": [row[r] for row in rows], "input_split_sizes": rows[r]} for r in range(P)]
        args["by_rank"] = by_rank
    elif op == "broadcast":
        entry, args["src"] = "op", 0
    else:
        args["dim"] = 0
        args |= {"dst": 0} if op == "gather" else {}
    case = Case(op, entry, [(numel,)] * P, dtype, ["strided"] * P, 5, args)
    expected = {
        "all_gather": lambda: reference.all_gather(case.inputs(), 0),
        "gather": lambda: reference.gather(case.inputs(), 0, 0),
        "all_to_all_single": lambda: reference.all_to_all_single(case.inputs(), rows),
        "broadcast": lambda: reference.broadcast(case.inputs(), 0),
    }[op]()
    agree(case, run(P, case), expected)
