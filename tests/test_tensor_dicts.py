"""Objects and dictionaries of tensors from rank to rank: every shape, dtype and layout, rings, parts, and failures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import draws
from tests.harness import Ranks
from tests.worlds import initialized

_TENSORS = st.lists(
    st.tuples(
        st.lists(st.sampled_from([0, 1, 2, 3, 4]), max_size=3).map(tuple),
        st.sampled_from(draws.ALL_DTYPES),
        st.sampled_from(draws.LAYOUTS),
        st.integers(0, 99),
    ),
    max_size=5,
)


def _dictionary(drawn: list[Any], rank: int) -> dict[Any, Any]:
    """A nested dictionary with the drawn tensors, different on each rank."""
    tensors = [draws.make(shape, dtype, layout, seed + 100 * rank) for shape, dtype, layout, seed in drawn]
    plain = {"rank": rank, 7: [1, (2.5, None)], "empty": {}, "text": "é"}
    return {**plain, "nested": {"deep": dict(enumerate(tensors[1:]))}, "list": tensors[:1], ("a", 1): torch.float16}


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, torch.Tensor):
        same = isinstance(y, torch.Tensor) and x.dtype == y.dtype and x.shape == y.shape and x.device == y.device
        return same and torch.equal(draws.bits(x), draws.bits(y))
    if isinstance(x, dict):
        return type(y) is dict and list(x) == list(y) and all(_same(x[key], y[key]) for key in x)
    if isinstance(x, list | tuple):
        return type(x) is type(y) and len(x) == len(y) and all(map(_same, x, y))
    return bool(x == y)


def _move(drawn: list[Any]) -> list[bool]:
    """The dictionary by all three ways; rings in which every rank sends first."""
    import fvops

    group = fvops.get_sp_group()
    me, P = group.rank_in_group, group.world_size
    own, previous = _dictionary(drawn, me), _dictionary(drawn, (me - 1) % P)
    told = []
    for src in (0, P - 1):
        got = group.broadcast_tensor_dict(own if me == src else None, src)
        told.append((got is own) if me == src else _same(got, _dictionary(drawn, src)))
    told.append(group.send_tensor_dict(own) is None)
    told.append(_same(group.recv_tensor_dict(), previous))
    group.send_object(own, (me + 1) % P)
    told.append(_same(group.recv_object((me - 1) % P), previous))
    return told


@given(drawn=_TENSORS)
@draws.profile(5)
def test_dictionaries_arrive_as_they_were(ranks: Ranks, drawn: list[Any]) -> None:
    assert ranks.run(_move, drawn) == [[True] * 5] * ranks.world_size


def _large_ring(numel: int) -> list[Any]:
    import fvops

    group = fvops.get_sp_group()
    me, P = group.rank_in_group, group.world_size
    x = torch.full((numel,), float(me))
    for dst in range(P):
        if dst != me:
            group.send_tensor_dict({"x": x, "again": x, "to": dst}, dst)
            group.send_object(bytes([me]) * numel, dst)
    # The caller may overwrite what it sent.
    x.fill_(-1)
    told = []
    for src in reversed([src for src in range(P) if src != me]):
        got = group.recv_tensor_dict(src)
        told.append(bool((got["x"] == src).all()) and got["again"] is got["x"] and got["to"] == me)
        told.append(group.recv_object(src) == bytes([src]) * numel)
    return told


def test_everybody_sends_much_to_everybody_first(ranks: Ranks) -> None:
    P = ranks.world_size
    assert ranks.run(_large_ring, 1 << 20) == [[True] * 2 * (P - 1)] * P


def _in_parts() -> list[Any]:
    """Pairs (0, 2) and (1, 3): each pair's halves form all_gather groups (0, 1) and (2, 3)."""
    import fvops
    from fvops.parallel_state import init_model_parallel_group

    with initialized(1, 2):
        gather = fvops.get_sp_group()
        across = init_model_parallel_group([[0, 2], [1, 3]], 0, "gloo", group_name="across")
        sent = {"even": torch.arange(12.0).view(3, 4).t(), "odd": torch.arange(7), "none": torch.empty(0), "s": "x"}
        if across.rank_in_group == 0:
            across.send_tensor_dict(sent, all_gather_group=gather)
            across.send_tensor_dict(sent, all_gather_group=gather)
            told: list[Any] = ["sender"]
        else:
            told = [_same(across.recv_tensor_dict(all_gather_group=gather), sent)]
            with pytest.raises(ValueError, match="both sides need groups alike"):
                across.recv_tensor_dict()
        across.destroy()
        return told


def test_tensors_travel_in_parts() -> None:
    assert Ranks.get(4).run(_in_parts, initialize=False) == [["sender"], ["sender"], [True], [True]]


class _Unknown:
    pass


def _failures() -> list[str]:
    import fvops

    group = fvops.get_sp_group()
    me, P = group.rank_in_group, group.world_size
    texts = []
    for bad in ({"a": {"b": _Unknown()}}, [1], None):
        with pytest.raises(TypeError) as caught:
            group.broadcast_tensor_dict(bad if me == 0 else None)
        texts.append(str(caught.value))
        with pytest.raises(TypeError):
            group.send_tensor_dict(bad)
        with pytest.raises(TypeError) as caught:
            group.recv_tensor_dict()
        texts.append(str(caught.value))
    with pytest.raises(TypeError):
        group.send_object(_Unknown(), (me + 1) % P)
    with pytest.raises(TypeError) as caught:
        group.recv_object((me - 1) % P)
    texts.append(str(caught.value))
    for call in (
        lambda: group.send_object(1, me),
        lambda: group.recv_object(me),
        lambda: group.send_tensor_dict({}, P),
    ):
        with pytest.raises(ValueError, match=group.unique_name):
            call()
    # Nothing is left over from any of it.
    return [*texts, str(group.broadcast_tensor_dict({"fine": 1} if me == 0 else None))]


def test_a_failing_sender_tells_the_receivers(ranks: Ranks) -> None:
    for texts in ranks.run(_failures):
        assert all("_Unknown" in text and "add_safe_globals" in text for text in (*texts[:2], texts[6]))
        assert all("needs a dictionary" in text for text in texts[2:6])
        assert texts[-1] == "{'fine': 1}"


def _too_large() -> list[str]:
    import fvops

    group = fvops.get_sp_group()
    own = group.rank_in_group == 0
    texts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FVOPS_MAX_OBJECT_MB", "1")
        for large in (torch.zeros(2 << 20, dtype=torch.uint8), bytes(2 << 20)):
            with pytest.raises((TypeError, ValueError)) as caught:
                group.broadcast_tensor_dict({"x": large} if own else None)
            texts.append(str(caught.value))
    return [*texts, str(group.broadcast_tensor_dict({"fine": 1} if own else None))]


def test_more_than_is_allowed_is_refused_everywhere(two_ranks: Ranks) -> None:
    for texts in two_ranks.run(_too_large):
        assert all("FVOPS_MAX_OBJECT_MB=1" in text for text in texts[:2])
        assert texts[2] == "{'fine': 1}"


def _of_one() -> list[Any]:
    import fvops

    with initialized(1, 1):
        group = fvops.get_sp_group()
        x = {"x": torch.ones(2)}
        for call in (lambda: group.send_object(1, 0), lambda: group.recv_object(0)):
            with pytest.raises(RuntimeError, match="no partner"):
                call()
        return [
            group.broadcast_tensor_dict(x) is x,
            group.send_tensor_dict(x) is x,
            group.recv_tensor_dict() is None,
        ]


def test_a_group_of_one(two_ranks: Ranks) -> None:
    assert two_ranks.run(_of_one, initialize=False) == [[True] * 3] * 2


def _given_groups() -> list[bool]:
    import torch.distributed as dist

    import fvops

    group = fvops.get_sp_group()
    other = dist.new_group(backend="gloo")
    x = {"x": torch.arange(5), "n": {"y": 1}}
    own = group.rank_in_group == 1
    got = group.broadcast_tensor_dict(x if own else None, 1, group=other, metadata_group=other)
    gradient = group.broadcast_tensor_dict({"p": torch.ones(2, requires_grad=True)} if own else None, 1)
    group.barrier()
    dist.destroy_process_group(other)
    return [_same(got, x), own or not gradient["p"].requires_grad]


def test_groups_that_are_given_are_used(two_ranks: Ranks) -> None:
    assert two_ranks.run(_given_groups) == [[True, True]] * 2
