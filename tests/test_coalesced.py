"""all_to_all_4D_coalesced: several tensors, each of its own shape, dtype and memory layout, in one exchange."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import reference
from tests.draws import FLOATS, INTEGERS, LAYOUTS, TINY_FLOATS, bits, make, profile, storage_bits
from tests.harness import Ranks

sizes = st.tuples(*[st.integers(1, 3)] * 4)
tensors = st.lists(
    st.tuples(sizes, st.sampled_from((*FLOATS, *TINY_FLOATS, *INTEGERS, torch.bool)), st.sampled_from(LAYOUTS)),
    min_size=1,
    max_size=4,
)


def _inputs(spec: list[Any], dim: int, P: int, rank: int) -> list[Tensor]:
    inputs = []
    for index, (shape, dtype, layout) in enumerate(spec):
        scaled = [size * P if d == dim else size for d, size in enumerate(shape)]
        # What a rank's memory looks like is its own affair.
        kind = layout if rank % 2 == 0 else "contiguous"
        inputs.append(make(scaled, dtype, kind, 100 * rank + index))
    return inputs


def _exchange(spec: list[Any], dims: tuple[int, int], entry: str) -> tuple[list[Tensor], list[str]]:
    import fvops
    from fvops.debug import record_collectives

    group = fvops.get_sp_group()
    inputs = _inputs(spec, dims[0], group.world_size, group.rank_in_group)
    before = [storage_bits(x) for x in inputs]
    with record_collectives() as records:
        if entry == "op":
            op = torch.ops.fvops.all_to_all_4D_coalesced
            outputs = op(inputs, *dims, group.world_size, group.unique_name)
        else:
            target = group if entry == "coordinator" else group.device_communicator
            outputs = target.all_to_all_4D_coalesced(inputs, *dims)
    wrong = [] if isinstance(outputs, list) else [f"a {type(outputs).__name__}"]
    if any(not torch.equal(storage_bits(x), memory) for x, memory in zip(inputs, before, strict=True)):
        wrong.append("an input was written")
    if any(not y.is_contiguous() for y in outputs):
        wrong.append("an output is not contiguous")
    nbytes = sum(x.numel() * x.element_size() for x in inputs)
    if [(record.op, record.nbytes, len(record.shapes)) for record in records] != [
        ("all_to_all_4D_coalesced", nbytes, len(inputs))
    ]:
        wrong.append(f"recorded {records}")
    return [y.clone() for y in outputs], wrong


@profile(10)
@given(
    spec=tensors, dims=st.sampled_from([(2, 1), (1, 2)]), entry=st.sampled_from(["coordinator", "op", "communicator"])
)
def test_each_tensor_follows_the_formula(ranks: Ranks, spec: list[Any], dims: tuple[int, int], entry: str) -> None:
    P = ranks.world_size
    replies = Ranks.get(P).run(_exchange, spec, dims, entry)
    inputs = [_inputs(spec, dims[0], P, rank) for rank in range(P)]
    for index in range(len(spec)):
        expected = reference.all_to_all_4D([inputs[rank][index].contiguous() for rank in range(P)], *dims)
        for rank, (outputs, wrong) in enumerate(replies):
            assert not wrong, (rank, wrong)
            assert outputs[index].shape == expected[rank].shape
            assert torch.equal(bits(outputs[index]), bits(expected[rank])), (spec, index, rank)


def _gradients(dims: tuple[int, int], way: str) -> tuple[list[Any], list[Tensor], list[Any]]:
    """q and v need a gradient, k does not; only q and the integers' exchange are used."""
    import fvops
    from fvops.debug import canonical, record_collectives

    group = fvops.get_sp_group()
    P, generator = group.world_size, torch.Generator().manual_seed(group.rank_in_group)
    shapes = [(2, 2 * P, 2 * P, 3), (1, P, P, 2), (2, P, 3 * P, 1)]
    q, k, v = (torch.randint(-9, 9, shape, generator=generator).double() for shape in shapes)
    q.requires_grad_()
    v.requires_grad_()
    target = group.device_communicator if way == "communicator" else group
    outputs = target.all_to_all_4D_coalesced([q, k, v], *dims)
    grad = torch.randint(-9, 9, outputs[0].shape, generator=generator).double()
    with record_collectives() as records:
        outputs[0].backward(grad)
    unused = [None if v.grad is None else v.grad.abs().sum().item(), k.grad]
    return [q.grad, *unused], [grad], [op for _, op, _ in canonical(records)]


@pytest.mark.parametrize("way", ["coordinator", "communicator"])
@pytest.mark.parametrize("dims", [(2, 1), (1, 2)], ids=str)
def test_gradients_travel_together(ranks: Ranks, dims: tuple[int, int], way: str) -> None:
    P = ranks.world_size
    replies = ranks.run(_gradients, dims, way)
    shapes = [(2, 2 * P, 2 * P, 3)] * P
    expected = reference.gradient_of_movement(
        lambda x: reference.all_to_all_4D(x, *dims), shapes, [grads[0] for _, grads, _ in replies]
    )
    for ((q_grad, v_total, k_grad), _, issued), wanted in zip(replies, expected, strict=True):
        assert torch.equal(q_grad, wanted)
        assert (v_total, k_grad) == (0.0, None)
        assert issued == ["all_to_all_4D_coalesced"]


def _integers_beside_floats() -> tuple[bool, list[Any]]:
    import fvops

    group = fvops.get_sp_group()
    x = torch.ones(1, 2, group.world_size, 1, requires_grad=True)
    mask = torch.ones(1, 2, group.world_size, 1, dtype=torch.int32)
    y, moved = group.all_to_all_4D_coalesced([x, mask])
    y.sum().backward()
    return moved.requires_grad, x.grad.flatten().tolist()


def test_integers_beside_floats_have_no_gradient(two_ranks: Ranks) -> None:
    assert two_ranks.run(_integers_beside_floats) == [(False, [1.0] * 4)] * 2


def _refusals() -> list[str]:
    import fvops

    group = fvops.get_sp_group()
    P = group.world_size
    good = torch.ones(1, 2, P, 1)
    told = []
    for inputs in ([], [good, torch.ones(1, 2, P + 1, 1)], [good, 3.0], [good, torch.ones(P)], [good, good.to("meta")]):
        try:
            group.all_to_all_4D_coalesced(inputs)
        except (ValueError, TypeError, RuntimeError) as error:
            told.append(f"{type(error).__name__}: {error}")
        else:
            told.append("nothing")
    return told


def test_refusals_name_op_group_and_cause(ranks: Ranks) -> None:
    P = ranks.world_size
    for told in ranks.run(_refusals):
        assert [text.split(":")[0] for text in told] == [
            "ValueError",
            "ValueError",
            "TypeError",
            "ValueError",
            "ValueError",
        ]
        assert all("fvops.all_to_all_4D_coalesced on group 'sp:0'" in text for text in told)
        for text, cause in zip(told, ["empty list", f"size {P + 1}", "float", "1 dims", "meta"], strict=True):
            assert cause in text


def test_one_rank_returns_its_inputs() -> None:
    inputs, same = Ranks.get(2).run(_one_rank, initialize=False)[0]
    assert inputs == 2
    assert same


def _one_rank() -> tuple[int, bool]:
    import fvops
    from tests.worlds import initialized

    with initialized(sp_size=1):
        x, y = torch.ones(1, 2, 3, 4), torch.ones(1, 1, 1, 1)
        outputs = fvops.get_sp_group().all_to_all_4D_coalesced([x, y])
        return len(outputs), outputs[0] is x and outputs[1] is y
