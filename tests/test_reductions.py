"""Reductions against the reference: exact for integers, bool, max and min; to the dtype's rounding for floats."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import reference
from tests.cases import ENTRIES, Case, agree, run
from tests.draws import FLOATS, NUMBERS, layouts, profile, shapes
from tests.harness import Ranks

entries = st.sampled_from(ENTRIES)
seeds = st.integers(0, 99)
# What each dtype has: sums of numbers, averages of floats, the rest also of bool.
reductions = st.one_of(
    st.tuples(st.sampled_from(["sum", "max", "min", "product"]), st.sampled_from(NUMBERS)),
    st.tuples(st.just("avg"), st.sampled_from([dtype for dtype in NUMBERS if dtype.is_floating_point])),
    st.tuples(st.sampled_from(["max", "min", "product"]), st.just(torch.bool)),
)


def _agree_rounded(case: Case, results: Sequence[Tensor | None], expected: Sequence[Tensor], op: str) -> None:
    """Bitwise where one rounding is all there can be, else within P roundings of the terms' largest sum."""
    if op in ("max", "min") or case.dtype not in FLOATS:
        expected = [wanted + 0 if wanted.dtype in FLOATS else wanted for wanted in expected]
        for result, wanted in zip(results, expected, strict=True):
            assert result is not None
            assert result.shape == wanted.shape
            # By value rather than by bits: -0.0 equals 0.0.
            assert torch.equal(_wide(result), _wide(wanted)), (case, result, wanted)
        return
    P = len(case.shapes)
    terms = torch.stack([_wide(x).abs() for x in case.inputs()])
    scale = terms.clamp(min=1).prod(0) if op == "product" else terms.sum(0) / (P if op == "avg" else 1)
    for rank, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        assert result is not None
        bound = P * torch.finfo(case.dtype).eps * _share(case, scale, rank)
        assert result.shape == wanted.shape
        assert bool(((_wide(result) - _wide(wanted)).abs() <= bound).all()), (case, rank, result, wanted)


def _share(case: Case, scale: Tensor, rank: int) -> Tensor:
    if case.op != "reduce_scatter":
        return scale
    return reference.shard([scale] * len(case.shapes), case.args["dim"])[rank]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype.is_floating_point else torch.int64)


@profile(30)
@given(shape=st.one_of(st.just(()), shapes), what=reductions, kinds=layouts, entry=entries, seed=seeds)
def test_all_reduce(
    ranks: Ranks, shape: tuple[int, ...], what: tuple[str, torch.dtype], kinds: list[str], entry: str, seed: int
) -> None:
    P, (op, dtype) = ranks.world_size, what
    case = Case("all_reduce", entry, [shape] * P, dtype, kinds, seed, {"op": op}, numbers=True)
    _agree_rounded(case, run(P, case), reference.all_reduce(case.inputs(), op), op)


@profile(30)
@given(shape=shapes, number=st.integers(0, 7), what=reductions, kinds=layouts, entry=entries, seed=seeds)
def test_reduce_scatter(
    ranks: Ranks,
    shape: tuple[int, ...],
    number: int,
    what: tuple[str, torch.dtype],
    kinds: list[str],
    entry: str,
    seed: int,
) -> None:
    P, (op, dtype) = ranks.world_size, what
    dim = number % (2 * len(shape)) - len(shape)
    whole = list(shape)
    whole[dim] *= P
    case = Case("reduce_scatter", entry, [whole] * P, dtype, kinds, seed, {"op": op, "dim": dim}, numbers=True)
    _agree_rounded(case, run(P, case), reference.reduce_scatter(case.inputs(), op, dim), op)


@profile(25)
@given(
    shape=st.one_of(st.just(()), shapes),
    dst=st.integers(0, 11),
    what=reductions,
    kinds=layouts,
    entry=st.sampled_from(["op", "communicator"]),
    seed=seeds,
)
def test_reduce_gives_dst_the_reduction_and_the_others_zeros(
    ranks: Ranks,
    shape: tuple[int, ...],
    dst: int,
    what: tuple[str, torch.dtype],
    kinds: list[str],
    entry: str,
    seed: int,
) -> None:
    P, (op, dtype) = ranks.world_size, what
    case = Case("reduce", entry, [shape] * P, dtype, kinds, seed, {"op": op, "dst": dst % P}, numbers=True)
    _agree_rounded(case, run(P, case), reference.reduce(case.inputs(), op, dst % P), op)


def _defaults(x: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    import fvops

    group = fvops.get_sp_group()
    own = x[group.rank_in_group]
    return (
        group.all_reduce(own),
        group.all_reduce(own, None),
        group.reduce_scatter(own),
        fvops.tensor_model_parallel_all_reduce(own),
    )


def test_the_default_is_a_sum_along_the_last_dim(ranks: Ranks) -> None:
    P = ranks.world_size
    inputs = [torch.arange(6 * P).reshape(3, 2 * P) * 10**rank for rank in range(P)]
    for rank, (plain, none, scattered, over_one) in enumerate(ranks.run(_defaults, inputs)):
        assert torch.equal(plain, reference.all_reduce(inputs, "sum")[rank])
        assert torch.equal(none, plain)
        assert torch.equal(scattered, reference.reduce_scatter(inputs, "sum", -1)[rank])
        assert torch.equal(over_one, inputs[rank])


def _sum_large(seed: int) -> Tensor:
    import fvops

    group = fvops.get_sp_group()
    generator = torch.Generator().manual_seed(seed + group.rank_in_group)
    return group.all_reduce(torch.randn(100_003, generator=generator))


def test_ranks_agree_on_a_sum_bit_for_bit(ranks: Ranks) -> None:
    results = ranks.run(_sum_large, 3)
    assert all(torch.equal(result, results[0]) for result in results)
    exact = sum(
        torch.randn(100_003, generator=torch.Generator().manual_seed(3 + rank)).double()
        for rank in range(ranks.world_size)
    )
    torch.testing.assert_close(results[0].double(), exact, rtol=1e-6, atol=1e-6)


def test_the_reference_knows_small_answers() -> None:
    x, y = torch.tensor([100, 1], dtype=torch.int8), torch.tensor([100, -3], dtype=torch.int8)
    assert reference.all_reduce([x, y], "sum")[0].tolist() == [-56, -2]
    assert reference.all_reduce([x, y], "product")[1].tolist() == [16, -3]
    assert reference.all_gather([x, y], 0)[0].tolist() == [100, 1, 100, -3]
    agree(
        Case("shard", "op", [(2,)] * 2, torch.int8, [], 0),
        reference.shard([x, y], 0),
        [torch.tensor([100], dtype=torch.int8), torch.tensor([-3], dtype=torch.int8)],
    )
