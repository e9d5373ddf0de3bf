"""The real NCCL in a world of one on one GPU, through `PyNcclCommunicator` and through the ops; also over the double.

The double runs the same bodies on CPU tensors, but for what needs streams. Each test runs in a worker.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.alone import OPS, group_of_one, input_of
from tests.devices import GPU, on_device, on_gpu
from tests.draws import ALL_DTYPES, FLOATS, INTEGERS, bits, make
from tests.harness import Ranks


@pytest.fixture(params=[pytest.param("nccl", id="double"), pytest.param("gpu-nccl", id="cuda", marks=GPU)])
def worker(request: pytest.FixtureRequest) -> Ranks:
    return Ranks.get(1, request.param)


@pytest.fixture
def gpu_worker() -> Ranks:
    return Ranks.get(1, "gpu-nccl")


def _communicator() -> Any:
    import fvops
    from fvops.device_communicators.pynccl import PyNcclCommunicator

    device = fvops.get_sp_group().device
    return PyNcclCommunicator(fvops.get_sp_group().cpu_group, device, allow_single_rank=True)


def _movers(dtypes: list[torch.dtype]) -> list[str]:
    """Which data movers do not deliver to oneself what was sent, by dtype."""
    comm, wrong = _communicator(), []
    for seed, dtype in enumerate(dtypes):
        x = on_device(make((6, 5), dtype, "contiguous", seed), comm.device)

        def check(name: str, out: torch.Tensor, sent: torch.Tensor = x, kind: torch.dtype = dtype) -> None:
            if not torch.equal(bits(out.cpu()), bits(sent.cpu())):
                wrong.append(f"{name} of {kind}")

        for name, args in (("all_gather", ()), ("all_to_all_single", ()), ("all_to_all_single", ([6], [6]))):
            out = torch.zeros_like(x)
            getattr(comm, name)(out, x, *args)
            check(f"{name}{args}", out)
        kept = x.clone()
        comm.broadcast(x, 0)
        check("broadcast", kept)
        first, second = torch.zeros_like(x), torch.zeros_like(x[:2])
        comm.group_start()
        comm.send(x, 0)
        comm.recv(first, 0)
        comm.send(x[:2], 0)
        comm.recv(second, 0)
        comm.group_end()
        check("grouped send and recv", first)
        check("second message of a group", second, x[:2])
    comm.destroy()
    return wrong


def test_data_movers_of_every_dtype(worker: Ranks) -> None:
    assert worker.run(_movers, list(ALL_DTYPES)) == [[]]


def _reductions(dtypes: list[torch.dtype]) -> tuple[list[str], list[torch.dtype]]:
    """Which reductions over one rank change a value, and the dtypes that the library does not reduce."""
    comm, wrong, unknown = _communicator(), [], []
    for seed, dtype in enumerate(dtypes):
        x = on_device(make((6, 5), dtype, "contiguous", seed, numbers=True), comm.device)
        for op in ("sum", "max", "min", "product", *(["avg"] if dtype.is_floating_point else [])):
            if not comm.reduces(dtype, op):
                unknown.append(dtype)
                continue
            scattered = torch.zeros_like(x)
            comm.reduce_scatter(scattered, x, op)
            for out in (comm.all_reduce(x, op), comm.reduce(x, 0, op), scattered):
                if not torch.equal(bits(out.cpu()), bits(x.cpu())):
                    wrong.append(f"{op} of {dtype}")
    comm.destroy()
    return wrong, sorted(set(unknown), key=str)


def test_reductions(worker: Ranks) -> None:
    # NCCL has no int16.
    assert worker.run(_reductions, [*FLOATS, *INTEGERS]) == [([], [torch.int16])]


def _on_another_stream() -> bool:
    """Out of place on a side stream, with the input dropped at once: its memory must not be handed out again early."""
    comm = _communicator()
    stream = torch.cuda.Stream()
    results = []
    for value in range(20):
        x = torch.full((1 << 22,), float(value), device=comm.device)
        stream.wait_stream(torch.cuda.current_stream())
        results.append(comm.all_reduce(x, stream=stream))
        del x
        torch.full((1 << 22,), -1.0, device=comm.device)
    torch.cuda.current_stream().wait_stream(stream)
    right = all(bool((y == value).all()) for value, y in enumerate(results))
    comm.destroy()
    return right


@on_gpu
def test_a_stream_of_the_callers(gpu_worker: Ranks) -> None:
    assert gpu_worker.run(_on_another_stream) == [True]


def _versions() -> tuple[int, bool, str]:
    comm = _communicator()
    version, ok, path = comm.nccl.get_version(), comm.available, comm.nccl.path
    comm.destroy()
    comm.destroy()
    return version, ok and comm.disabled and comm.abort_reason is None, path


@on_gpu
def test_the_library_is_the_one_that_torch_loaded(gpu_worker: Ranks) -> None:
    ((version, ok, path),) = gpu_worker.run(_versions)
    major, minor, patch = torch.cuda.nccl.version()[:3]
    assert ok
    assert "libnccl.so" in path
    assert version == major * 10000 + minor * 100 + patch, path


def _ops(layout: str) -> list[str]:
    """Which ops give anything but their input, or record not one collective each (`shard` sends nothing)."""
    from fvops.debug import record_collectives

    group, wrong = group_of_one(), []
    for number, (name, op) in enumerate(OPS.items()):
        x = input_of(number, group.device, layout=layout)
        before = x.clone()
        with record_collectives() as records:
            y = op(x, group.unique_name)
        if not torch.equal(y, before) or not torch.equal(x, before) or y.data_ptr() == x.data_ptr():
            wrong.append(name)
        if [record.op for record in records] != [name.split(",")[0]][: name != "shard"]:
            wrong.append(f"{name} recorded {records}")
    return wrong


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_every_op_alone(worker: Ranks, layout: str) -> None:
    assert worker.run(_ops, layout) == [[]]


def _gradients() -> list[str]:
    group, wrong = group_of_one(), []
    for name in ("all_to_all_4D", "all_to_all_4D_coalesced", "all_to_all_single", "all_reduce", "all_gather"):
        x = input_of(1, group.device, torch.float32).requires_grad_()
        grad = input_of(2, group.device, torch.float32)
        OPS[name](x, group.unique_name).backward(grad)
        if not torch.equal(x.grad, grad):
            wrong.append(name)
    return wrong


def test_gradients_alone(worker: Ranks) -> None:
    assert worker.run(_gradients) == [[]]
