"""What an op may not do while a CUDA graph is captured, seen without a GPU: over the NCCL double, with streams that say
that a capture is under way and note what is asked of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.harness import Ranks

# What allocates, views or copies on the device. Anything else on a captured path is looked at by a person first.
ALLOWED = {
    "empty", "empty_like", "new_empty", "as_strided", "view", "permute", "transpose", "unflatten", "select", "slice",
    "clone", "copy_", "_to_copy", "contiguous", "to",
    "alias", "expand", "detach", "movedim", "unsqueeze", "zero_", "div_", "add", "mul",
}  # fmt: skip


class _Watch(TorchDispatchMode):
    """Notes torch operators that are not allowed, c10d's collectives (a vote) and host synchronisations included."""

    def __init__(self) -> None:
        super().__init__()
        self.forbidden: list[str] = []
        # Memory that torch's allocator gave out, or the caller: what a graph's pool would hold.
        self.memory: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note(args)
        if func.namespace == "fvops":
            # The op's own implementation, so that what it does is seen.
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.namespace != "aten" or name not in ALLOWED:
            self.forbidden.append(str(func))
        result = func(*args, **(kwargs or {}))
        self._note([result])
        return result

    def _note(self, values: Any) -> None:
        for tensor in values:
            if isinstance(tensor, torch.Tensor):
                start = tensor.untyped_storage().data_ptr()
                self.memory.append((start, start + max(1, tensor.untyped_storage().nbytes())))

    def holds(self, address: int) -> bool:
        """Is `address` in memory that was seen?"""
        return any(start <= address < end for start, end in self.memory)


class _Addresses:
    """The library, and the addresses that it is handed: a replay uses the same ones."""

    NAMES = ("all_reduce", "reduce", "all_gather", "reduce_scatter", "broadcast", "send", "recv", "all_to_all")

    def __init__(self, library: Any) -> None:
        self._library = library
        self.given: list[int] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._library, name)
        if name not in self.NAMES:
            return found

        def noted(*args: Any) -> Any:
            buffers = (
                2 if name in ("all_reduce", "reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast") else 1
            )
            self.given.extend(args[:buffers])
            return found(*args)

        return noted


class _Capturing:
    """The device's streams during a capture: what is asked of them is noted and handed on."""

    def __init__(self, streams: Any) -> None:
        self._streams = streams
        self.asked: list[str] = []

    def capturing(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        self.asked.append(name)
        return getattr(self._streams, name)


def _calls(group: Any) -> dict[str, Callable[[], Any]]:
    P = group.world_size
    x = torch.ones(1, P, P, 2)
    return {
        "all_to_all_4D": lambda: group.all_to_all_4D(x),
        "all_to_all_4D_coalesced": lambda: group.all_to_all_4D_coalesced([x, x.transpose(1, 2)]),
        "all_to_all_single": lambda: group.all_to_all_single(x[0]),
        "all_reduce": lambda: group.all_reduce(x),
        "all_gather": lambda: group.all_gather(x),
        "reduce_scatter": lambda: group.reduce_scatter(x, dim=1),
        "broadcast": lambda: torch.ops.fvops.broadcast(x, 0, P, group.unique_name),
        "gather": lambda: group.gather(x),
        "ring": lambda: _ring(group, x),
    }


def _ring(group: Any, x: torch.Tensor) -> torch.Tensor:
    # In a capture a send is in line with the rest: one side sends first.
    if group.rank_in_group % 2 == 0:
        group.send(x)
        return group.recv(x.shape, x.dtype)
    received = group.recv(x.shape, x.dtype)
    group.send(x)
    return received


def _under_capture(warm: bool) -> tuple[dict[str, str], list[str]]:
    """What each call did or raised, and what was asked of the streams."""
    import fvops
    from fvops import registry

    group = fvops.initialize_sequence_parallel_group(2, group_name_suffix=f"capture_{warm}")
    communicator = registry.resolve(group.unique_name, 2)
    if warm:
        group.warmup([(1, 2, 2, 2)], torch.float32)
    calls = _calls(group)
    before = {name: call() for name, call in calls.items()} if warm else {}
    group.barrier()  # what a thread sends for the calls above is sent
    streams = _Capturing(communicator._streams)
    places = [communicator, communicator.library_comm, communicator.transport._lanes]
    lanes = communicator.transport._lanes
    places += [*lanes._out.values(), *lanes._in.values()]
    for place in places:
        place._streams = streams
    comms = [communicator.library_comm, *lanes._in.values(), *(lane._comm for lane in lanes._out.values())]
    addresses = [_Addresses(comm.library) for comm in comms]
    for comm, library in zip(comms, addresses, strict=True):
        comm.library = library
    told = {}
    for name, call in [*calls.items(), ("barrier", group.barrier)]:
        try:
            with _Watch() as watch:
                result = call()
            same = name not in before or all(map(_equal, _list(result), _list(before[name])))
            told[name] = f"forbidden: {watch.forbidden}" if watch.forbidden else "ok" if same else "other values"
            given = [address for library in addresses for address in library.given]
            if warm and name != "barrier" and not given:
                told[name] = "the library was handed nothing"
            if not all(map(watch.holds, given)):
                told[name] = "the library was handed memory that is neither the caller's nor from torch's allocator"
            for library in addresses:
                library.given.clear()
        except RuntimeError as error:
            told[name] = str(error)
    for place in places:
        place._streams = streams._streams
    for comm, library in zip(comms, addresses, strict=True):
        comm.library = library._library
    group.destroy()
    return told, sorted(set(streams.asked))


def _list(result: Any) -> list[Any]:
    return result if isinstance(result, list) else [result]


def _equal(a: Any, b: Any) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


@pytest.fixture(scope="module")
def nccl_ranks() -> Ranks:
    return Ranks.get(2, "nccl")


def test_a_warm_group_captures_every_op_but_barrier(nccl_ranks: Ranks) -> None:
    for told, asked in nccl_ranks.run(_under_capture, True):
        barrier = told.pop("barrier")
        assert told == dict.fromkeys(told, "ok")
        assert "fvops.barrier on group 'sp_capture_True:0': a barrier waits on the host" in barrier
        # Never a new stream, nor a wait for one.
        assert set(asked) <= {"resolve", "handle", "keep", "use", "use_device", "event"}


def test_a_first_use_inside_a_capture_is_refused_and_names_the_cure(nccl_ranks: Ranks) -> None:
    for told, _ in nccl_ranks.run(_under_capture, False):
        assert "barrier" in told.pop("barrier")
        for name, text in told.items():
            assert "its first use is inside a CUDA-graph capture" in text, (name, text)
            assert "warmup(shapes, dtype)" in text
            assert "'sp_capture_False:0'" in text
