"""Objects from rank to rank: what may travel, what is refused on every rank, and that nothing hostile runs."""

from __future__ import annotations

import datetime
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import Ranks


class Plain:
    """A class that nobody has allowed."""

    def __init__(self, number: int) -> None:
        self.number = number


class Allowed(Plain):
    """A class that a test allows."""


class Hostile:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def _nested() -> dict[str, Any]:
    x = torch.arange(12).reshape(3, 4)
    return {
        "list": [1, 2.5, None, True, "text", b"bytes", (3, [4, {"deep": (5,)}])],
        "tensor": x.float(),
        "transposed": x.t(),
        "bfloat16": x.to(torch.bfloat16),
        "empty": torch.empty(0, 3),
        "dtype": torch.float16,
        "size": torch.Size([2, 3]),
        "set": {1, 2},
        "ordered": OrderedDict(a=1, b=2),
        7: "an integer key",
    }


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, torch.Tensor):
        return isinstance(y, torch.Tensor) and x.dtype == y.dtype and torch.equal(x, y)
    if isinstance(x, dict):
        return type(x) is type(y) and x.keys() == y.keys() and all(_equal(x[key], y[key]) for key in x)
    if isinstance(x, list | tuple):
        return type(x) is type(y) and len(x) == len(y) and all(map(_equal, x, y))
    return bool(x == y)


def _broadcast_nested() -> list[bool]:
    import fvops

    group = fvops.get_sp_group()
    told = []
    for src in range(group.world_size):
        own = group.rank_in_group == src
        told.append(_equal(group.broadcast_object(_nested() if own else None, src), _nested()))
        items = [_nested(), src, None] if own else ["old", "items", "here"]
        told.append(group.broadcast_object_list(items, src) is items and _equal(items, [_nested(), src, None]))
    told.append(group.broadcast_object("default" if group.rank_in_group == 0 else None) == "default")
    over = [group.rank_in_group]
    told.append(group.broadcast_object_list(over, 1, group=group.device_group) == [1])
    return told


def test_containers_and_tensors_travel_from_every_place(ranks: Ranks) -> None:
    P = ranks.world_size
    assert ranks.run(_broadcast_nested) == [[True] * (2 * P + 2)] * P


def _broadcast_in_a_second_group() -> list[int]:
    import fvops
    from tests.worlds import initialized

    with initialized(1, 2):
        group = fvops.get_sp_group()
        mine = group.rank if group.rank_in_group == 1 else None
        return [group.broadcast_object(mine, src=1), *group.broadcast_object_list([mine], src=1)]


def test_src_is_a_place_in_the_group() -> None:
    assert Ranks.get(4).run(_broadcast_in_a_second_group, initialize=False) == [[1, 1], [1, 1], [3, 3], [3, 3]]


def _broadcast_unsafe(kind: str) -> str:
    import fvops

    group = fvops.get_sp_group()
    obj = {"plain": Plain(1), "deep": [{"a": Plain(2)}], "lambda": lambda: 1}[kind]
    with pytest.raises(TypeError) as caught:
        group.broadcast_object(obj if group.rank_in_group == 0 else None)
    assert group.broadcast_object(5 if group.rank_in_group == 0 else None) == 5
    return str(caught.value)


@pytest.mark.parametrize("kind", ["plain", "deep"])
def test_a_class_that_was_not_allowed_is_refused_on_every_rank(ranks: Ranks, kind: str) -> None:
    for text in ranks.run(_broadcast_unsafe, kind):
        assert "add_safe_globals" in text
        assert "Plain" in text


def test_what_cannot_be_pickled_is_refused_on_every_rank(ranks: Ranks) -> None:
    for text in ranks.run(_broadcast_unsafe, "lambda"):
        assert "cannot be sent" in text or "could not send" in text


def _broadcast_allowed() -> list[Any]:
    import fvops

    fvops.add_safe_globals([Allowed])
    fvops.add_safe_globals([datetime.timedelta])
    group = fvops.get_sp_group()
    got = group.broadcast_object([Allowed(3), datetime.timedelta(1)] if group.rank_in_group == 0 else None)
    return [type(got[0]).__name__, got[0].number, got[1].days]


def test_a_class_that_every_rank_allowed_travels(ranks: Ranks) -> None:
    assert ranks.run(_broadcast_allowed) == [["Allowed", 3, 1]] * ranks.world_size


def _receive_hostile(folder: str) -> str:
    """Rank 0 sends bytes of its own making, as a rank that was taken over would."""
    import io

    import fvops
    from fvops import objects, serialization

    group = fvops.get_sp_group()
    buffer = io.BytesIO()
    torch.save([Hostile(f"{folder}/executed-{os.environ['RANK']}")], buffer)
    hostile = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    with pytest.raises(ValueError, match="pickles are not read"):
        serialization.decode(hostile.numpy().tobytes())
    with pytest.raises(TypeError):
        serialization.encode(Hostile(f"{folder}/executed-by-encode"))
    if group.rank_in_group:
        with pytest.raises(ValueError) as caught:
            group.broadcast_object()
        return str(caught.value)
    original = objects.encode
    objects.encode = lambda *_: bytearray(hostile.numpy().tobytes())
    try:
        group.broadcast_object("anything")
    finally:
        objects.encode = original
    return "refused to decode"


def test_a_hostile_pickle_is_refused_and_not_executed(ranks: Ranks, tmp_path: Path) -> None:
    for text in ranks.run(_receive_hostile, str(tmp_path)):
        assert "refused to decode" in text
    assert list(tmp_path.iterdir()) == []


def _safe_globals_are_scoped() -> list[Any]:
    import fvops

    fvops.add_safe_globals([Allowed])
    fvops.get_sp_group().broadcast_object(Allowed(1))
    return [item for item in torch.serialization.get_safe_globals() if item is Allowed]


def test_allowing_a_class_here_leaves_torch_load_as_it_was(two_ranks: Ranks) -> None:
    assert two_ranks.run(_safe_globals_are_scoped) == [[], []]
