"""The Triton kernel on CPU tensors, under Triton's interpreter, against plain indexing.

`TRITON_INTERPRET` is read when triton decorates a kernel, so all of this runs in one worker process of its own; in it
the torch twin raises when it is called, so that what passes here was done by the kernel.
"""

from __future__ import annotations

import itertools
import mmap
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.draws import LAYOUTS, bits, make, profile, storage_bits

pytest.importorskip("triton")

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.float8_e4m3fn,
    torch.int16,
    torch.bfloat16,
    torch.float32,
    torch.int64,
    torch.complex64,
    torch.complex128,
)
MODES = ((2, 1), (1, 2))

Run = Callable[..., Any]
Case = tuple[tuple[int, int, int, int, int], torch.dtype, str]  # (P, B, s, h, D), dtype, layout


def _serve(calls: Connection) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from fvops.kernels import parts_torch

    def refuse(*_: object) -> None:
        raise RuntimeError("the torch twin was called in a test of the Triton kernel")

    parts_torch.copy_parts = refuse
    while True:
        function, args = calls.recv()
        try:
            calls.send((function(*args), None))
        except Exception:  # whatever it was, the test shows it
            calls.send((None, traceback.format_exc()))


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Run]:
    """Calls a function of this module in the worker; a wrong address kills it, and that is a failure at once."""
    context = multiprocessing.get_context("spawn")
    calls, theirs = context.Pipe()
    worker = context.Process(target=_serve, args=(theirs,), daemon=True)
    worker.start()
    theirs.close()

    def call(function: Callable[..., Any], *args: Any) -> Any:
        assert worker.is_alive(), "the worker died in an earlier test"
        calls.send((function, args))
        if not wait([calls, worker.sentinel], timeout=120):
            worker.kill()
            pytest.fail(f"{function.__name__}{args} took more than 120 s")
        if not calls.poll():
            pytest.fail(f"the worker died in {function.__name__}{args}")
        try:
            result, error = calls.recv()
        except EOFError:
            pytest.fail(f"the worker died in {function.__name__}{args}")
        assert error is None, error
        return result

    yield call
    worker.kill()
    worker.join()


def _config(tile: int) -> Any:
    from fvops.kernels.parts_copy import CopyConfig

    return CopyConfig(elements_per_program=tile)


def _is_interpreted() -> str:
    from fvops.kernels import parts_copy

    return type(parts_copy._copy_parts).__name__


def test_the_worker_interprets(interpreted: Run) -> None:
    assert interpreted(_is_interpreted) == "InterpretedFunction"


# The exchange's layouts --------------------------------------------------------------------------------------------


def _slices(x_BSHD: Tensor, mode: tuple[int, int], P: int) -> list[Tensor]:
    """What each rank is sent in `mode`: its heads or its rows, by plain slicing."""
    dim = mode[0]
    n = x_BSHD.size(dim) // P
    return [x_BSHD[:, :, r * n : (r + 1) * n] if dim == 2 else x_BSHD[:, r * n : (r + 1) * n] for r in range(P)]


def _view(x_BSHD: Tensor, dim: int, P: int) -> Tensor:
    from fvops.kernels import layout

    return (layout.heads_by_rank if dim == 2 else layout.sequence_by_rank)(x_BSHD, P)


def _shape(case: Case, dim: int) -> tuple[int, int, int, int]:
    P, B, s, h, D = case[0]
    return (B, s, P * h, D) if dim == 2 else (B, P * s, h, D)


def _pack(cases: Sequence[Case], mode: tuple[int, int]) -> None:
    from fvops.kernels.pack import pack

    P = cases[0][0][0]
    inputs = [make(_shape(c, mode[0]), c[1], c[2], seed) for seed, c in enumerate(cases)]
    before = [storage_bits(x) for x in inputs]
    views = [_view(x, mode[0], P) for x in inputs]
    sends = pack(views, backend="triton")
    for x, memory, view, send in zip(inputs, before, views, sends, strict=True):
        assert send.is_contiguous()
        assert (send is view) == view.is_contiguous()
        for r, expected in enumerate(_slices(x, mode, P)):
            assert torch.equal(bits(send[r]), bits(expected)), f"rank {r} of {tuple(x.shape)} {x.dtype} {x.stride()}"
        assert torch.equal(storage_bits(x), memory)


def _unpack(cases: Sequence[Case], mode: tuple[int, int]) -> None:
    from fvops.kernels.layout import receive_buffer
    from fvops.kernels.pack import unpack

    P = cases[0][0][0]
    # Rank r's part of the output is what it sent: its rows in mode (2, 1), its heads in (1, 2).
    outputs = [make(_shape(c, mode[1]), c[1], c[2], seed) for seed, c in enumerate(cases)]
    wanted = []
    views, received = [], []
    for seed, output in enumerate(outputs):
        view = _view(output, mode[1], P)
        buffer = receive_buffer(view)
        buffer.copy_(make(view.shape, view.dtype, "contiguous", 100 + seed))
        expected = torch.empty(0, dtype=output.dtype).set_(
            output.untyped_storage().clone(), output.storage_offset(), output.shape, output.stride()
        )
        for r, part in enumerate(_slices(expected, mode[::-1], P)):
            part.copy_(buffer[r])
        views.append(view)
        received.append(buffer)
        wanted.append(storage_bits(expected))
    unpack(received, views, backend="triton")
    for output, memory in zip(outputs, wanted, strict=True):
        assert torch.equal(storage_bits(output), memory), f"{tuple(output.shape)} {output.dtype} {output.stride()}"


@st.composite
def _exchanges(draw: st.DrawFn, layouts: Sequence[str]) -> list[Case]:
    P, B, D = draw(st.integers(1, 4)), draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([1, 3, 5, 8, 24, 64]))
    s = draw(st.sampled_from([0, 1, 2, 5, 40]))
    dtype = draw(st.sampled_from(DTYPES))
    one = st.builds(
        lambda h, other, layout: ((P, B, s, h, D), other, layout),
        st.integers(0 if s == 0 else 1, 4),
        st.sampled_from([dtype, dtype, dtype, torch.bfloat16]),
        st.sampled_from(layouts),
    )
    return draw(st.lists(one, min_size=1, max_size=3))


@profile(40)
@given(_exchanges(LAYOUTS), st.sampled_from(MODES))
def test_pack(interpreted: Run, cases: list[Case], mode: tuple[int, int]) -> None:
    interpreted(_pack, cases, mode)


@profile(40)
@given(_exchanges([layout for layout in LAYOUTS if layout != "expanded"]), st.sampled_from(MODES))
def test_unpack(interpreted: Run, cases: list[Case], mode: tuple[int, int]) -> None:
    interpreted(_unpack, cases, mode)


def test_wan_heads_and_uneven_kv(interpreted: Run) -> None:
    """q with 12 heads, k and v with 4, over 4 ranks: rows of 768 and 256 bytes in one launch."""
    q, kv = ((4, 1, 70, 3, 128), torch.bfloat16, "contiguous"), ((4, 1, 70, 1, 128), torch.bfloat16, "contiguous")
    interpreted(_pack, [q, kv, kv], (2, 1))
    interpreted(_unpack, [q, kv, kv], (1, 2))


# Any pairs ---------------------------------------------------------------------------------------------------------


def _copy(drawn: Sequence[tuple[tuple[int, ...], torch.dtype, str, str, int]], tile: int) -> None:
    from fvops.kernels.parts_copy import copy_parts

    sources, destinations, wanted = [], [], []
    for seed, (shape, dtype, source_layout, destination_layout, turn) in enumerate(drawn):
        source, destination = make(shape, dtype, source_layout, seed), make(shape, dtype, destination_layout, seed + 50)
        order = [*range(turn % max(1, len(shape)), len(shape)), *range(turn % max(1, len(shape)))]
        source, destination = source.permute(order), destination.permute(order)
        expected = torch.empty(0, dtype=dtype).set_(
            destination.untyped_storage().clone(), destination.storage_offset(), destination.shape, destination.stride()
        )
        for index in itertools.product(*map(range, source.shape)):
            expected[index] = source[index]
        sources.append(source)
        destinations.append(destination)
        wanted.append(storage_bits(expected))
    copy_parts(sources, destinations, _config(tile))
    for i, (destination, memory) in enumerate(zip(destinations, wanted, strict=True)):
        assert torch.equal(storage_bits(destination), memory), f"pair {i} of {drawn}"


_pairs = st.tuples(
    st.lists(st.sampled_from([0, 1, 1, 2, 3, 4, 7]), max_size=5).map(tuple),
    st.sampled_from([dtype for dtype in DTYPES if dtype != torch.float8_e4m3fn]),  # no indexing on CPU
    st.sampled_from(LAYOUTS),
    st.sampled_from([layout for layout in LAYOUTS if layout != "expanded"]),
    st.integers(0, 4),
)


@profile(40)
@given(st.lists(_pairs, min_size=1, max_size=4), st.sampled_from([2, 16, 64, 1024]))
def test_any_strides_in_blocks_of_any_size(interpreted: Run, drawn: Any, tile: int) -> None:
    interpreted(_copy, drawn, tile)


# Far addresses -----------------------------------------------------------------------------------------------------


def _far(dtype: torch.dtype, shift: int, far_source: bool) -> None:
    """Rows more than 2**31 elements apart, in a mapped file that is all holes but for the pages of the rows."""
    from fvops.kernels.parts_copy import copy_parts

    size = torch.empty((), dtype=dtype).element_size()
    apart = (1 << 31) + 16
    count = shift + 2 * apart + 64
    with tempfile.TemporaryFile() as sparse:
        sparse.truncate(count * size)
        room = torch.frombuffer(mmap.mmap(sparse.fileno(), count * size), dtype=dtype)
    for rows, row_stride, outer, outer_stride in ((3, apart, 1, 64), (3, 32, 2, apart)):
        if shift + (rows - 1) * row_stride + (outer - 1) * outer_stride + 16 > count:
            raise ValueError("the rows do not fit into the reserved memory")
        far = room.as_strided((outer, rows, 16), (outer_stride, row_stride, 1), shift)
        near = make((outer, rows, 16), dtype, "contiguous", 7)
        if far_source:
            far.copy_(near)
            got = torch.zeros_like(near)
            copy_parts([far], [got])
        else:
            far.zero_()
            copy_parts([near], [far])
            got = far.clone()
        assert torch.equal(bits(got), bits(near))


@pytest.mark.parametrize("far_source", [True, False])
@pytest.mark.parametrize(("dtype", "shift"), [(torch.uint8, 1), (torch.int64, 0)])
def test_offsets_beyond_32_bits(interpreted: Run, dtype: torch.dtype, shift: int, far_source: bool) -> None:
    interpreted(_far, dtype, shift, far_source)
