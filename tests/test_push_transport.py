"""The transport over symmetric memory on CPU ranks: the class that GPUs get, over the double's memory, interpreted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests import reference
from tests.draws import LAYOUTS, bits, make
from tests.harness import Ranks
from tests.symmetric_double import SharedBuffer, interpreted

pytest.importorskip("triton")


class _Streams:
    """`Streams` of a CPU, on which a capture can be pretended."""

    asynchronous = False
    inside = False

    def capturing(self) -> bool:
        return self.inside

    def resolve(self, op: str, group_name: str, stream: Any) -> Any:
        return None


def _create(kind: Any = SharedBuffer) -> tuple[Any, str]:
    import fvops
    from fvops import registry
    from fvops.device_communicators.symmetric_transport import SymmetricTransport

    interpreted()
    group = fvops.get_sp_group()
    base = registry.resolve(group.unique_name, group.world_size).transport
    streams: Any = _Streams()
    return SymmetricTransport.create(base, group.cpu_group, group.unique_name, streams, kind)


@contextlib.contextmanager
def _symmetric() -> Iterator[tuple[Any, Any]]:
    """The group, exchanging through the transport, and the transport."""
    import fvops
    from fvops import registry

    group = fvops.get_sp_group()
    communicator = registry.resolve(group.unique_name, group.world_size)
    transport, words = _create()
    if transport is None:
        raise RuntimeError(words)
    communicator.transport = transport
    try:
        yield group, transport
    finally:
        communicator.transport = transport.base
        transport._release()


def _pushed(transport: Any) -> int:
    """How many exchanges the kernel has done in the present buffer."""
    from fvops.kernels.push_plan import EPOCH

    return int(transport._buffer.room.words[EPOCH])


# Values ------------------------------------------------------------------------------------------------------------


def _input(shape: tuple[int, ...], rank: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return make(shape, dtype, LAYOUTS[(rank + seed) % len(LAYOUTS)], 10 * seed + rank, numbers=True)


def _ops() -> list[str]:
    with _symmetric() as (group, transport):
        P, r = group.world_size, group.rank_in_group
        shape = (2, 2 * P, 3 * P, 5)
        inputs = [[_input(shape, rank, seed) for rank in range(P)] for seed in range(3)]
        mine = [tensors[r] for tensors in inputs]
        start = _pushed(transport)
        wrong = []

        def check(name: str, got: torch.Tensor, wanted: torch.Tensor, pushes: int) -> None:
            if not torch.equal(bits(got), bits(wanted)):
                wrong.append(name)
            if _pushed(transport) - start != pushes:
                wrong.append(f"{name}: {_pushed(transport) - start} exchanges were pushed, not {pushes}")

        check("mode (2, 1)", group.all_to_all_4D(mine[0], 2, 1), reference.all_to_all_4D(inputs[0], 2, 1)[r], 1)
        check("mode (1, 2)", group.all_to_all_4D(mine[1], 1, 2), reference.all_to_all_4D(inputs[1], 1, 2)[r], 2)
        for i, got in enumerate(group.all_to_all_4D_coalesced(mine, 2, 1)):
            check(f"coalesced {i}", got, reference.all_to_all_4D(inputs[i], 2, 1)[r], 3)
        rows = [_input((2 * P, 3), rank, 5) for rank in range(P)]
        check("single", group.all_to_all_single(rows[r]), reference.all_to_all_single(rows, [[2] * P] * P)[r], 4)
        check("sum", group.all_reduce(mine[0]), reference.all_reduce(inputs[0], "sum")[r], 4)
        check("gather", group.all_gather(mine[0], 1), reference.all_gather(inputs[0], 1)[r], 4)
        empty = group.all_to_all_4D(mine[0][:, :, :, :0], 2, 1)
        check("empty", empty, torch.empty(2, 2 * P * P, 3, 0, dtype=torch.bfloat16), 4)
        x = _input((1, 2, P, 3), r, 7, torch.float32).clone().requires_grad_()
        y = group.all_to_all_4D(x, 2, 1)
        y.backward(y.detach())
        check("gradient", x.grad, x.detach(), 6)
        return wrong


def test_exchanges_are_pushed_and_the_rest_is_not(ranks: Ranks) -> None:
    assert ranks.run(_ops) == [[]] * ranks.world_size


def _compiled() -> tuple[bool, bool, list[str]]:
    from fvops.debug import record_collectives

    with _symmetric() as (group, transport):
        P = group.world_size

        def program(x: torch.Tensor) -> torch.Tensor:
            q, k = group.all_to_all_4D_coalesced([x * 2, x + 1], 2, 1)
            return group.all_reduce(group.all_to_all_4D(q + k, 1, 2)) + x

        x = _input((1, 3, 2 * P, 4), group.rank_in_group, 1, torch.float32)
        with record_collectives() as eager:
            wanted = program(x)
        before = _pushed(transport)
        with record_collectives() as compiled:
            got = torch.compile(program, fullgraph=True)(x)
        return torch.equal(got, wanted), _pushed(transport) == before + 2, [str(eager == compiled)]


@pytest.mark.slow  # the graph knows nothing of transports
def test_compiled_is_eager(two_ranks: Ranks) -> None:
    assert two_ranks.run(_compiled) == [(True, True, ["True"])] * 2


# How large ---------------------------------------------------------------------------------------------------------


def _sizes() -> list[Any]:
    """A slot of 1 MB at most: in the first one, in a grown one, and too large for it."""
    os.environ["FVOPS_SYMM_SLOT_MB"] = "1"
    try:
        told: list[Any] = []
        with _symmetric() as (group, transport):
            P = group.world_size
            for kilobytes in (256, 1024, 1025, 256):
                x = _input((1, kilobytes, P, 256 // P), group.rank_in_group, 1, torch.float32)
                inputs = [_input((1, kilobytes, P, 256 // P), rank, 1, torch.float32) for rank in range(P)]
                right = torch.equal(group.all_to_all_4D(x), reference_heads(inputs, group.rank_in_group))
                told.append((right, transport._buffer.room.slot_bytes >> 10, _pushed(transport)))
        return told
    finally:
        del os.environ["FVOPS_SYMM_SLOT_MB"]


def reference_heads(inputs: list[torch.Tensor], r: int) -> torch.Tensor:
    """Mode (2, 1) of one head a rank, by slicing: `tests.reference` goes element by element."""
    return torch.cat([x[:, :, r : r + 1] for x in inputs], 1)


def test_the_buffer_grows_up_to_its_limit(two_ranks: Ranks) -> None:
    # The first buffer has seen the two exchanges of the proof.
    expected = [(True, 512, 3), (True, 1024, 1), (True, 1024, 1), (True, 1024, 2)]
    assert two_ranks.run(_sizes) == [expected] * 2


def _no_room() -> list[Any]:
    with _symmetric() as (group, transport):
        SharedBuffer.most_bytes = 2 << 20 if group.rank_in_group == 1 else 1 << 40
        try:
            x = torch.ones(1, 2048, group.world_size, 128)
            right = bool((group.all_to_all_4D(x) == 1).all())
            return [right, _pushed(transport), transport._most_bytes, bool((group.all_to_all_4D(x) == 1).all())]
        finally:
            SharedBuffer.most_bytes = 1 << 40


def test_no_room_on_one_rank_keeps_all_at_the_size_they_have(two_ranks: Ranks) -> None:
    assert two_ranks.run(_no_room) == [[True, 2, 512 << 10, True]] * 2


def _capture() -> list[Any]:
    with _symmetric() as (group, transport):
        P = group.world_size
        small, large = torch.ones(1, 4, P, 8), torch.ones(1, 2048, P, 128)
        transport._streams.inside = True
        told: list[Any] = [bool((group.all_to_all_4D(small) == 1).all())]
        try:
            group.all_to_all_4D(large)
        except RuntimeError as error:
            told.append(str(error))
        transport._streams.inside = False
        captured = transport._buffer
        told.append(bool((group.all_to_all_4D(large) == 1).all()))
        return [*told, transport._kept == [captured], transport._buffer is not captured]


def test_a_capture_never_grows_the_buffer_and_keeps_it(two_ranks: Ranks) -> None:
    for small, refusal, large, kept, new in two_ranks.run(_capture):
        assert small
        assert "fvops.all_to_all_4D on group 'sp:" in refusal
        assert "cannot grow inside a CUDA-graph capture; call the group's warmup(shapes, dtype)" in refusal
        assert large
        assert kept
        assert new


# Agreement ---------------------------------------------------------------------------------------------------------


def _refused(how: str) -> tuple[bool, str]:
    """What all ranks say when place 1 cannot: it has no such memory, cannot allocate, or its kernel fails."""
    import fvops

    class Kind(SharedBuffer):
        pass

    push = interpreted()
    take, second = push._take, fvops.get_sp_group().rank_in_group == 1
    if second and how == "memory":
        Kind.refuses = "it has none"
    if second and how == "allocation":
        Kind.most_bytes = 0
    if second and how == "kernel":
        push._take = None
    if second and how == "values":
        push._take = {(n,): _nothing for n in range(1, 100)}
    try:
        transport, words = _create(Kind)
        return transport is None, words
    finally:
        push._take = take


def _nothing(*_: Any, **__: Any) -> None:
    """A kernel that leaves its destination as it is."""


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("memory", "place 1: it has none"),
        ("allocation", "place 1: no symmetric memory for slots of 524288 bytes: no room for"),
        ("kernel", "place 1: a first exchange failed: TypeError"),
        ("values", "place 1: a first exchange gave other values than shared memory"),
    ],
)
def test_one_rank_that_cannot_is_all_ranks(two_ranks: Ranks, how: str, told: str) -> None:
    for none, words in two_ranks.run(_refused, how):
        assert none
        assert told in words


def _by_name(refuses: bool) -> str:
    """A CUDA communicator on CPU tensors that is asked for symmetric memory beside gloo."""
    import fvops
    from fvops.device_communicators.cuda_communicator import CudaCommunicator

    class Kind(SharedBuffer):
        refuses = ""

    class Communicator(CudaCommunicator):
        SYMMETRIC = Kind

    interpreted()
    group = fvops.get_sp_group()
    Kind.refuses = "not here" if refuses and group.rank_in_group == 0 else ""
    before = os.environ.get("FVOPS_TRANSPORT", "auto")
    os.environ["FVOPS_TRANSPORT"] = "symm"
    try:
        communicator = Communicator(group.cpu_group, torch.device("cpu"), group.device_group, "named:0")
        x = torch.full((1, 2, group.world_size, 3), float(group.rank_in_group))
        y = communicator.all_to_all_4D(x)
        name = communicator.transport.name
        communicator.destroy()
        return f"{name}: {y[0, :, 0, 0].tolist()}"
    except RuntimeError as error:
        return str(error)
    finally:
        os.environ["FVOPS_TRANSPORT"] = before


def test_asked_for_by_name(two_ranks: Ranks) -> None:
    works = "symmetric memory, else torch.distributed (gloo): [0.0, 0.0, 1.0, 1.0]"
    assert two_ranks.run(_by_name, False) == [works] * 2
    fails = "group 'named:0': FVOPS_TRANSPORT=symm, but place 0: not here"
    assert two_ranks.run(_by_name, True) == [fails] * 2


# The watchdog ------------------------------------------------------------------------------------------------------


def _missing(deadline_s: float) -> list[Any]:
    """Place 0 stays away from an exchange: what the others get, and what their next call says."""
    import fvops

    with _symmetric() as (group, transport):
        transport._watchdog._deadline_s = deadline_s
        told: list[Any] = []
        if group.rank_in_group:
            x = torch.ones(1, 2, group.world_size, 3)
            told.append(bool(group.all_to_all_4D(x).isnan().all()))
            try:
                group.all_to_all_4D_coalesced([x])
            except RuntimeError as error:
                told.append(str(error))
        fvops.get_world_group().barrier()
    # The call that was given up broke the group: the next test gets another.
    fvops.cleanup_dist_env_and_memory()
    return told


def test_a_wait_on_the_device_is_given_up_and_reported() -> None:
    first, *others = Ranks.get(3).run(_missing, 2.0)
    assert first == []
    for void, told in others:
        assert void
        assert "fvops.all_to_all_4D_coalesced on group 'sp:" in told
        assert "missing: place 0 (global rank 0)" in told
        assert "waits on the device since" in told
        assert "the last that Python issued was" in told
