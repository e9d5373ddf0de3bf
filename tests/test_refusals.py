"""Bad input is refused on every rank, in words that help, before anything is sent; the group works on afterwards."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import Ranks


def _grad(*shape: int) -> Tensor:
    return torch.ones(shape, requires_grad=True)


def _meta(*shape: int) -> Tensor:
    return torch.ones(shape, device="meta")


def _sparse(*shape: int) -> Tensor:
    return torch.ones(shape).to_sparse()


# name -> (the call on group `g` of `P` ranks, the error's kind, what its text says; {P} and {name} are filled in).
BAD: dict[str, tuple[Callable[[Any, int], Any], type[Exception], str]] = {
    "heads": (lambda g, P: g.all_to_all_4D(torch.ones(1, 2, P + 1, 3)), ValueError, "dim 2.*size {P+1}.*{P}"),
    "sequence": (lambda g, P: g.all_to_all_4D(torch.ones(1, P + 1, 2, 3), 1, 2), ValueError, "dim 1.*size {P+1}.*{P}"),
    "dims (1, 3)": (lambda g, P: g.all_to_all_4D(torch.ones(1, P, P, P), 1, 3), ValueError, "scatter_dim=1"),
    "dims (2, 2)": (lambda g, P: g.all_to_all_4D(torch.ones(1, P, P, P), 2, 2), ValueError, "gather_dim=2"),
    "dims (-2, 1)": (lambda g, P: g.all_to_all_4D(torch.ones(1, P, P, P), -2, 1), ValueError, "scatter_dim=-2"),
    "3D tensor": (lambda g, P: g.all_to_all_4D(torch.ones(1, P, P)), ValueError, "4D.*3 dims"),
    "5D tensor": (lambda g, P: g.all_to_all_4D(torch.ones(1, P, P, P, P)), ValueError, "4D.*5 dims"),
    "all_gather dim": (lambda g, P: g.all_gather(torch.ones(2, 2), 2), ValueError, "dim 2.*2 dims"),
    "all_gather 0-dim": (lambda g, P: g.all_gather(torch.ones(())), ValueError, "dim -1.*0 dims"),
    "gather dim": (lambda g, P: g.gather(torch.ones(2, 2), 0, -3), ValueError, "dim -3"),
    "shard dim": (lambda g, P: g.shard(torch.ones(P), 1, scale_grad=True), ValueError, "dim 1"),
    "shard size": (lambda g, P: g.shard(torch.ones(P + 1), 0, scale_grad=True), ValueError, "dim 0.*{P+1}.*{P}"),
    "shard negative dim": (
        lambda g, P: g.shard(torch.ones(2, P + 1, 3), -2, scale_grad=True),
        ValueError,
        "dim 1.*{P+1}.*{P}",
    ),
    "reduce_scatter dim": (lambda g, P: g.reduce_scatter(torch.ones(P), dim=1), ValueError, "dim 1"),
    "reduce_scatter size": (lambda g, P: g.reduce_scatter(torch.ones(P + 1)), ValueError, "dim 0.*{P+1}.*{P}"),
    "a2a rows": (lambda g, P: g.all_to_all_single(torch.ones(P + 1)), ValueError, "dim 0.*{P+1}.*{P}"),
    "a2a 0-dim": (lambda g, P: g.all_to_all_single(torch.ones(())), ValueError, "0-dim"),
    "a2a one list": (lambda g, P: g.all_to_all_single(torch.ones(P), [1] * P), ValueError, "both"),
    "a2a short": (lambda g, P: g.all_to_all_single(torch.ones(P), [1] * P, [P]), ValueError, "1 sizes.*{P} ranks"),
    "a2a sum": (lambda g, P: g.all_to_all_single(torch.ones(P), [2] * P, [2] * P), ValueError, "add up to"),
    "a2a negative": (
        lambda g, P: g.all_to_all_single(torch.ones(P), [1] * P, [-1, P + 1] + [0] * (P - 2)),
        ValueError,
        "negative size -1",
    ),
    "broadcast src": (lambda g, P: g.broadcast(torch.ones(2), P), ValueError, "src={P}.*0 to {P-1}"),
    "broadcast into expanded": (lambda g, P: g.broadcast(torch.ones(1).expand(4), 0), ValueError, "share memory"),
    "broadcast negative src": (lambda g, P: g.broadcast(torch.ones(2), -1), ValueError, "src=-1"),
    "gather dst": (lambda g, P: g.gather(torch.ones(2), P), ValueError, "dst={P}.*0 to {P-1}"),
    "gather negative dst": (lambda g, P: g.gather(torch.ones(2), -1), ValueError, "dst=-1"),
    "send dst": (lambda g, P: g.send(torch.ones(2), P), ValueError, "dst={P}.*0 to {P-1}"),
    "send negative dst": (lambda g, P: g.send(torch.ones(2), -1), ValueError, "dst=-1"),
    "send to oneself": (lambda g, P: g.send(torch.ones(2), g.rank_in_group), ValueError, "itself"),
    "recv src": (lambda g, P: g.recv((2,), torch.float32, P), ValueError, "src={P}.*0 to {P-1}"),
    "recv from oneself": (lambda g, P: g.recv((2,), torch.float32, g.rank_in_group), ValueError, "itself"),
    "object src": (lambda g, P: g.broadcast_object(1, P), ValueError, "src={P}"),
    "object list src": (lambda g, P: g.broadcast_object_list([1], -1), ValueError, "src=-1"),
    "reduce dst": (
        lambda g, P: torch.ops.fvops.reduce(torch.ones(2), "sum", P, P, g.unique_name),
        ValueError,
        "dst={P}",
    ),
    "complex sum": (lambda g, P: g.all_reduce(torch.ones(2, dtype=torch.complex64)), TypeError, "complex64"),
    "complex scatter": (lambda g, P: g.reduce_scatter(torch.ones(P, dtype=torch.complex64)), TypeError, "complex64"),
    "bool sum": (lambda g, P: g.all_reduce(torch.ones(2, dtype=torch.bool)), TypeError, "sum of torch.bool"),
    "bool avg": (lambda g, P: _avg(g, torch.ones(2, dtype=torch.bool)), TypeError, "avg"),
    "integer avg": (lambda g, P: _avg(g, torch.ones(2, dtype=torch.int64)), TypeError, "avg.*int64"),
    "unknown reduction": (lambda g, P: g.all_reduce(torch.ones(2), "median"), ValueError, "median.*sum"),
    "bitwise reduction": (lambda g, P: g.all_reduce(torch.ones(2), _reduce_op("BAND")), ValueError, "BAND.*SUM"),
    "gather gradient": (lambda g, P: g.gather(_grad(2)), RuntimeError, "no gradient.*detach"),
    "send gradient": (lambda g, P: g.send(_grad(2)), RuntimeError, "no gradient"),
    "broadcast gradient": (lambda g, P: g.broadcast(_grad(2)), RuntimeError, "no gradient"),
    "max gradient": (lambda g, P: g.all_reduce(_grad(2), _reduce_op("MAX")), RuntimeError, "max has no gradient"),
    "min gradient": (lambda g, P: g.all_reduce(_grad(2), _reduce_op("MIN")), RuntimeError, "min has no gradient"),
    "product gradient": (
        lambda g, P: g.all_reduce(_grad(2), _reduce_op("PRODUCT")),
        RuntimeError,
        "product has no gradient",
    ),
    "scatter max gradient": (
        lambda g, P: g.reduce_scatter(_grad(P), _reduce_op("MAX")),
        RuntimeError,
        "max has no gradient",
    ),
    "wrong world size": (
        lambda g, P: torch.ops.fvops.all_reduce(torch.ones(2), "sum", P + 1, g.unique_name),
        RuntimeError,
        "{P} ranks.*{P+1}",
    ),
    "wrong rank": (
        lambda g, P: torch.ops.fvops.shard(torch.ones(P), 0, False, (g.rank_in_group + 1) % P, P, g.unique_name),
        RuntimeError,
        "place",
    ),
}
# Each op on a tensor that is elsewhere, or has no strides.
for _kind, _make, _says in (("meta", _meta, "on meta.*on cpu"), ("sparse", _sparse, "sparse")):
    BAD |= {
        f"{_kind} all_reduce": (lambda g, P, make=_make: g.all_reduce(make(2)), ValueError, _says),
        f"{_kind} all_gather": (lambda g, P, make=_make: g.all_gather(make(2)), ValueError, _says),
        f"{_kind} reduce_scatter": (lambda g, P, make=_make: g.reduce_scatter(make(P)), ValueError, _says),
        f"{_kind} all_to_all_4D": (lambda g, P, make=_make: g.all_to_all_4D(make(1, P, P, 1)), ValueError, _says),
        f"{_kind} all_to_all_single": (lambda g, P, make=_make: g.all_to_all_single(make(P)), ValueError, _says),
        f"{_kind} broadcast": (lambda g, P, make=_make: g.broadcast(make(2)), ValueError, _says),
        f"{_kind} gather": (lambda g, P, make=_make: g.gather(make(2)), ValueError, _says),
        f"{_kind} shard": (lambda g, P, make=_make: g.shard(make(P), scale_grad=False), ValueError, _says),
        f"{_kind} send": (lambda g, P, make=_make: g.send(make(2)), ValueError, _says),
    }
BAD["meta recv"] = (
    lambda g, P: torch.ops.fvops.recv(
        [2], torch.float32, torch.device("meta"), (g.rank_in_group + 1) % P, P, g.unique_name
    ),
    ValueError,
    "meta",
)
# These name no group or have words of their own.
_NAMELESS = {"unknown reduction", "bitwise reduction"}


def _reduce_op(name: str) -> Any:
    import torch.distributed as dist

    return getattr(dist.ReduceOp, name)


def _avg(group: Any, x: Tensor) -> Tensor:
    return group.all_reduce(x, _reduce_op("AVG"))


def _refused(name: str) -> tuple[str, str, list[str], str]:
    import fvops
    from fvops.debug import record_collectives

    group = fvops.get_sp_group()
    call, kind, _ = BAD[name]
    with record_collectives() as records:
        try:
            call(group, group.world_size)
        except kind as error:
            text = str(error)
        else:
            text = "NOT REFUSED"
    good = group.all_reduce(torch.full((2,), float(group.rank_in_group)))
    return text, group.unique_name, [record.op for record in records], str(good.tolist())


@pytest.mark.parametrize("name", BAD)
def test_refused_before_anything_is_sent(ranks: Ranks, name: str) -> None:
    P = ranks.world_size
    says = BAD[name][2].replace("{P+1}", str(P + 1)).replace("{P-1}", str(P - 1)).replace("{P}", str(P))
    for text, group, sent, good in ranks.run(_refused, name):
        assert text != "NOT REFUSED"
        assert re.search(says, text, re.DOTALL), text
        assert name in _NAMELESS or group in text
        assert sent == []
        total = float(P * (P - 1) // 2)
        assert good == str([total, total])


def _refused_twice_removed(kind: str) -> list[str]:
    """Global ranks as `src` or `dst` in a group that is not the world."""
    import fvops
    from fvops.debug import record_collectives
    from tests import harness

    harness.init_fvops(sp_size=2)
    group = fvops.get_sp_group()
    calls = {
        "next_rank": lambda: group.send(torch.ones(2), dst=group.next_rank),
        "prev_rank": lambda: group.recv((2,), torch.float32, src=group.prev_rank),
        "first_rank": lambda: group.broadcast(torch.ones(2), src=group.first_rank),
        "last_rank": lambda: group.gather(torch.ones(2), dst=group.last_rank),
    }
    with record_collectives() as records:
        try:
            if group.first_rank:
                calls[kind]()
            text = "" if not group.first_rank else "NOT REFUSED"
        except ValueError as error:
            text = str(error)
    assert records == []
    total = group.all_reduce(torch.ones(1)).item()
    fvops.get_world_group().barrier()
    fvops.cleanup_dist_env_and_memory()
    return [text, str(total)]


@pytest.mark.parametrize("kind", ["next_rank", "prev_rank", "first_rank", "last_rank"])
def test_global_ranks_are_refused_where_the_group_is_not_the_world(kind: str) -> None:
    for rank, (text, total) in enumerate(Ranks.get(4).run(_refused_twice_removed, kind, initialize=False)):
        assert total == "2.0"
        assert ("global ranks are not accepted" in text) == (rank >= 2), text


def _unknown_group() -> str:
    import fvops

    with pytest.raises(RuntimeError) as caught:
        torch.ops.fvops.all_reduce(torch.ones(2), "sum", fvops.get_sp_world_size(), "nobody:7")
    return str(caught.value)


def test_an_unknown_group_name_is_answered_with_the_known_ones(two_ranks: Ranks) -> None:
    for text in two_ranks.run(_unknown_group):
        assert "'nobody:7'" in text
        assert "'sp:0'" in text


def _communicator_refusals() -> list[str]:
    import fvops

    communicator = fvops.get_sp_group().device_communicator
    assert communicator is not None
    P = communicator.world_size
    texts = []
    for call in (
        lambda: communicator.all_to_all_4D(_grad(1, 1, P + 1, 1)),
        lambda: communicator.all_gather(_grad(2), 1),
        lambda: communicator.gather(_grad(2)),
        lambda: communicator.send(_grad(2)),
        lambda: communicator.broadcast(_grad(2)),
        lambda: communicator.reduce(_grad(2), 0),
        lambda: communicator.all_reduce(_grad(2), "max"),
        lambda: communicator.slice(_grad(P + 1), 0),
    ):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            call()
        texts.append(str(caught.value))
    return texts


def test_the_communicators_own_methods_refuse_alike(two_ranks: Ranks) -> None:
    for texts in two_ranks.run(_communicator_refusals):
        assert all("'sp:0'" in text for text in texts), texts


def _bad_group_for_function() -> str:
    from fvops.device_communicators.base_device_communicator import DistributedAutograd

    with pytest.raises(TypeError) as caught:
        DistributedAutograd.AllReduce.apply("sp:0", torch.ones(2), "sum")
    return str(caught.value)


def test_distributed_autograd_wants_a_process_group(two_ranks: Ranks) -> None:
    assert all("ProcessGroup" in text for text in two_ranks.run(_bad_group_for_function))
