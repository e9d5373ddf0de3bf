"""The shared-memory transport's collectives against the reference, mixed, through every part of its protocol."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.draws import ALL_DTYPES, LAYOUTS, NUMBERS, profile
from tests.harness import Ranks
from tests.shm_calls import CONFIGURATIONS, REDUCING, Call, agree, fresh_transport, run_calls

OPS = (
    *("all_to_all_4D", "all_to_all_single", "all_gather", "gather", "broadcast", "ring"),
    *("all_reduce", "reduce", "reduce_scatter"),
)
UNSIGNED = (torch.uint16, torch.uint32)


@st.composite
def _calls(draw: Any, P: int) -> Call:
    op = draw(st.sampled_from(OPS))
    sizes = st.sampled_from([0, 1, 2, 3, 7])
    shape = draw(st.lists(sizes, min_size=1, max_size=4))
    dim = draw(st.integers(0, len(shape) - 1))
    place = draw(st.integers(0, P - 1))
    args: dict[str, Any] = {}
    if op == "all_to_all_4D":
        shape = draw(st.lists(sizes, min_size=4, max_size=4))
        scatter_dim, gather_dim = draw(st.sampled_from([(2, 1), (1, 2)]))
        args = {"scatter_dim": scatter_dim, "gather_dim": gather_dim}
        shape[scatter_dim] *= P
    elif op == "all_to_all_single":
        args["rows"] = [draw(st.lists(sizes, min_size=P, max_size=P)) for _ in range(P)]
    elif op in ("all_gather", "gather", "reduce_scatter"):
        args["dim"] = dim
        shape[dim] *= P if op == "reduce_scatter" else 1
    if op in ("gather", "reduce"):
        args["dst"] = place
    if op == "broadcast":
        args["src"] = place
    dtype = draw(st.sampled_from(ALL_DTYPES))
    if op in REDUCING:
        dtype = draw(st.sampled_from((*NUMBERS, *UNSIGNED, torch.bool)))
        ops = ["max", "min", "product"] + ["sum"] * (dtype != torch.bool) + ["avg"] * dtype.is_floating_point
        args["op"] = draw(st.sampled_from(ops))
    layouts = draw(st.lists(st.sampled_from(LAYOUTS), min_size=P, max_size=P))
    return Call(op, tuple(shape), dtype, layouts, draw(st.integers(0, 99)), args)


@pytest.mark.parametrize("name", CONFIGURATIONS)
@profile(7)
@given(data=st.data())
def test_mixed_calls_give_what_the_reference_gives(ranks: Ranks, name: str, data: Any) -> None:
    P = ranks.world_size
    calls = data.draw(st.lists(_calls(P), min_size=5, max_size=9))
    replies = Ranks.get(P).run(run_calls, name, calls, deadline_s=60)
    for number, call in enumerate(calls):
        told = [reply[number] for reply in replies]
        assert not any(complaints for _, complaints in told), (call, told)
        agree(call, [result for result, _ in told], P)


def _exchange_together(count: int) -> list[Any]:
    """`count` tensors in one exchange, each with shapes of its own."""
    from fvops.kernels import layout

    told = []
    for options in ({}, {"eager_bytes": 0}, {"eager_bytes": 0, "slot_bytes": 128, "segment_bytes": 64 << 10}):
        with fresh_transport(**options) as transport:
            P, rank = transport.world_size, transport.rank
            inputs = [_numbered(rank, number, P) for number in range(count)]
            outputs = [transport.empty((1, 3 * P, 2, number + 1), torch.int32) for number in range(count)]
            transport.exchange(
                [layout.sequence_by_rank(y, P) for y in outputs], [layout.heads_by_rank(x, P) for x in inputs]
            )
            told.append([y.clone() for y in outputs])
            transport.barrier()
    return told


def _numbered(rank: int, number: int, P: int) -> torch.Tensor:
    shape = (1, 3, 2 * P, number + 1)
    return torch.arange(torch.Size(shape).numel(), dtype=torch.int32).reshape(shape) + 10_000 * rank + 100_000 * number


@pytest.mark.parametrize("count", [3, 200])
def test_several_tensors_in_one_exchange(ranks: Ranks, count: int) -> None:
    P = ranks.world_size
    for rank, told in enumerate(ranks.run(_exchange_together, count)):
        for outputs in told:
            for number, y in enumerate(outputs):
                parts = [_numbered(j, number, P)[:, :, 2 * rank : 2 * rank + 2] for j in range(P)]
                assert torch.equal(y, torch.cat(parts, 1))


def _sums(sizes: list[int], dtype: torch.dtype) -> list[torch.Tensor]:
    with fresh_transport() as transport:
        results = []
        for size in sizes:
            generator = torch.Generator().manual_seed(size + transport.rank)
            x = torch.randn(size, generator=generator).to(dtype)
            y = transport.empty((size,), dtype)
            transport.all_reduce(y, x, "sum")
            results.append(y.clone())
        transport.barrier()
        return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ranks_get_the_same_bits_of_a_sum(ranks: Ranks, dtype: torch.dtype) -> None:
    # Around the sizes where one step becomes two and one piece becomes several.
    sizes = [1, 1000, 32_768, 32_769, 65_537, 300_001]
    told = ranks.run(_sums, sizes, dtype)
    for number, size in enumerate(sizes):
        terms = [
            torch.randn(size, generator=torch.Generator().manual_seed(size + rank)).to(dtype)
            for rank in range(ranks.world_size)
        ]
        in_order = sum(term.float() for term in terms[1:]) + terms[0].float() if len(terms) == 2 else None
        assert all(torch.equal(results[number], told[0][number]) for results in told), size
        exact = sum(term.double() for term in terms)
        torch.testing.assert_close(told[0][number].double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)
        if in_order is not None:
            assert torch.equal(told[0][number], in_order.to(dtype))


def _from_threads(rounds: int) -> list[float]:
    """Calls in turn from two threads that hand over to each other, as forward and backward do."""
    import threading

    with fresh_transport(eager_bytes=0) as transport:
        turns = [threading.Semaphore(1), threading.Semaphore(0)]
        sums: list[float] = []

        def work(own: int) -> None:
            for number in range(rounds):
                turns[own].acquire()
                x = torch.full((40,), float(number + transport.rank))
                y = transport.empty((40,), torch.float32)
                transport.all_reduce(y, x, "sum")
                sums.append(float(y[17]))
                turns[1 - own].release()

        threads = [threading.Thread(target=work, args=(own,)) for own in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        transport.barrier()
        return sums


def test_calls_may_come_from_changing_threads(ranks: Ranks) -> None:
    P = ranks.world_size
    wanted = [float(P * number + sum(range(P))) for number in range(20) for _ in (0, 1)]
    assert ranks.run(_from_threads, 20) == [wanted] * P


def _ring(nbytes: int, rounds: int) -> list[bool]:
    """Everyone sends `rounds` messages before receiving any, the pool too small for one."""
    with fresh_transport(segment_bytes=2 << 20, slot_bytes=4096) as transport:
        P, rank = transport.world_size, transport.rank
        for number in range(rounds):
            x = torch.full((nbytes + number,), rank + number, dtype=torch.uint8)
            transport.send(x, (rank + 1) % P)
            x.fill_(255)
        transport.send(torch.empty(0), (rank + 1) % P)
        right = []
        for number in range(rounds):
            y = torch.empty(nbytes + number, dtype=torch.uint8)
            transport.recv(y, (rank - 1) % P)
            right.append(bool((y == (rank - 1) % P + number).all()))
        transport.recv(torch.empty(0), (rank - 1) % P)
        return right


@pytest.mark.parametrize("nbytes", [0, 100, 1024, 3_000_000])
def test_a_ring_in_which_all_send_first(ranks: Ranks, nbytes: int) -> None:
    assert all(all(right) for right in ranks.run(_ring, nbytes, 5))
