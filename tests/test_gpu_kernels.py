"""Packing on a GPU: the Triton kernel against plain slicing and against its torch twin, bit for bit.

Each test runs in a worker: a wrong address would spoil CUDA for every later test of the process. The same bodies run on
CPU tensors, where `pack` takes the twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.devices import GPU, on_device, on_gpu
from tests.draws import ALL_DTYPES, LAYOUTS, bits, make, profile, storage_bits
from tests.harness import Ranks

# Heads of q, k and v, rows of a rank, head size, at P=4 (docs/performance.md names the models).
MODELS = {
    "Wan2.1-1.3B": ((12, 12, 12), 8190, 128),
    "Wan2.1-14B-720p": ((40, 40, 40), 18900, 128),
    "HunyuanVideo": ((24, 24, 24), 29700, 128),
    "CogVideoX-5B": ((48, 48, 48), 4444, 64),
    "grouped k and v": ((16, 4, 4), 4097, 80),
}
# One entry of a drawn exchange: (P, B, s, h, D), dtype, layout.
Case = tuple[tuple[int, int, int, int, int], torch.dtype, str]


@pytest.fixture(params=[pytest.param("process_group", id="cpu"), pytest.param("gpu-gloo", id="cuda", marks=GPU)])
def worker(request: pytest.FixtureRequest) -> Ranks:
    return Ranks.get(1, request.param)


def _device() -> torch.device:
    import fvops

    return fvops.get_local_torch_device()


def _view(x_BSHD: Tensor, dim: int, P: int) -> Tensor:
    from fvops.kernels import layout

    return (layout.heads_by_rank if dim == 2 else layout.sequence_by_rank)(x_BSHD, P)


def _parts(x_BSHD: Tensor, dim: int, P: int) -> list[Tensor]:
    """Each rank's heads (dim 2) or rows (dim 1), by plain slicing."""
    n = x_BSHD.size(dim) // P
    return [x_BSHD.narrow(dim, r * n, n) for r in range(P)]


def _shape(case: Case, dim: int) -> tuple[int, int, int, int]:
    P, B, s, h, D = case[0]
    return (B, s, P * h, D) if dim == 2 else (B, P * s, h, D)


def _pack(cases: Sequence[Case], dim: int) -> None:
    from fvops.kernels.pack import pack

    P = cases[0][0][0]
    inputs = [make(_shape(case, dim), case[1], case[2], seed) for seed, case in enumerate(cases)]
    there = [on_device(x, _device()) for x in inputs]
    assert [x.stride() for x in there] == [x.stride() for x in inputs]
    sends = pack([_view(x, dim, P) for x in there])
    for x, moved, send in zip(inputs, there, sends, strict=True):
        assert send.is_contiguous()
        for part, wanted in zip(send.cpu(), _parts(x, dim, P), strict=True):
            assert torch.equal(bits(part), bits(wanted)), (tuple(x.shape), x.dtype, x.stride())
        assert torch.equal(storage_bits(moved).cpu(), storage_bits(x))


def _unpack(cases: Sequence[Case], dim: int) -> None:
    """What each rank sent, laid down in outputs of any layout; nothing else of their memory is written."""
    from fvops.kernels.pack import unpack

    P = cases[0][0][0]
    outputs = [make(_shape(case, dim), case[1], case[2], seed) for seed, case in enumerate(cases)]
    there = [on_device(x, _device()) for x in outputs]
    received = []
    for seed, output in enumerate(outputs):
        buffer = make(_view(output, dim, P).shape, output.dtype, "contiguous", 100 + seed)
        for part, rows in zip(_parts(output, dim, P), buffer, strict=True):
            part.copy_(rows)
        received.append(buffer.to(_device()))
    unpack(received, [_view(x, dim, P) for x in there])
    for output, moved in zip(outputs, there, strict=True):
        assert torch.equal(storage_bits(moved).cpu(), storage_bits(output)), (output.dtype, output.stride())


@st.composite
def _exchanges(draw: st.DrawFn, layouts: Sequence[str]) -> list[Case]:
    P, B, D = (
        draw(st.integers(1, 8)),
        draw(st.sampled_from([1, 1, 2, 3])),
        draw(st.sampled_from([1, 3, 8, 24, 64, 128])),
    )
    s = draw(st.sampled_from([0, 1, 2, 5, 40, 333]))
    dtype = draw(st.sampled_from(ALL_DTYPES))
    one = st.builds(
        lambda h, other, layout: ((P, B, s, h, D), other, layout),
        st.integers(1, 5),
        st.sampled_from([dtype, dtype, dtype, torch.bfloat16]),
        st.sampled_from(layouts),
    )
    return draw(st.lists(one, min_size=1, max_size=3))


@profile(20)
@given(_exchanges(LAYOUTS), st.sampled_from([2, 1]))
def test_pack(worker: Ranks, cases: list[Case], dim: int) -> None:
    worker.run(_pack, cases, dim, initialize=False)


@profile(20)
@given(_exchanges([layout for layout in LAYOUTS if layout != "expanded"]), st.sampled_from([2, 1]))
def test_unpack(worker: Ranks, cases: list[Case], dim: int) -> None:
    worker.run(_unpack, cases, dim, initialize=False)


def _model(heads: Sequence[int], rows: int, D: int, B: int, dtype: torch.dtype) -> list[str]:
    """What differs between the kernel and its twin, packing and unpacking q, k and v both ways at P=4."""
    from fvops.kernels.pack import pack, unpack

    device, P, wrong = _device(), 4, []
    generator = torch.Generator(device).manual_seed(0)
    for dim in (2, 1):
        shapes = [(B, rows, h, D) if dim == 2 else (B, rows * P, h // P, D) for h in heads]
        inputs = [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]
        views = [_view(x, dim, P) for x in inputs]
        sends, twins = pack(views), pack(views, backend="torch")
        if not all(map(torch.equal, sends, twins)):
            wrong.append(f"pack, dim {dim}")
        outputs = [torch.zeros_like(x) for x in inputs]
        unpack(twins, [_view(x, dim, P) for x in outputs])
        if not all(map(torch.equal, outputs, inputs)):
            wrong.append(f"unpack, dim {dim}")
    return wrong


@on_gpu
@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_the_shapes_of_models(model: str, B: int) -> None:
    heads, rows, D = MODELS[model]
    assert Ranks.get(1, "gpu-gloo").run(_model, heads, rows, D, B, torch.bfloat16, initialize=False) == [[]]


def test_a_small_model_on_cpu() -> None:
    assert Ranks.get(1, "process_group").run(_model, (8, 4, 4), 9, 16, 2, torch.bfloat16, initialize=False) == [[]]


def _far(elements: int, far_source: bool) -> bool:
    """Are 3 rows moved right that lie so many bytes apart, to or from a packed buffer?"""
    from fvops.kernels.pack import pack, unpack

    device = _device()
    room = torch.empty(2 * elements + 64, dtype=torch.uint8, device=device)
    far = room.as_strided((3, 5, 7), (elements, 7, 1), 1)
    near = make((3, 5, 7), torch.uint8, "contiguous", 3).to(device)
    if far_source:
        far.copy_(near)
        return torch.equal(pack([far])[0], near)
    far.zero_()
    unpack([near], [far])
    return torch.equal(far, near)


@pytest.mark.parametrize("far_source", [True, False])
@pytest.mark.parametrize(
    ("transport", "elements"),
    [
        pytest.param("process_group", 1 << 12, id="cpu"),
        pytest.param("gpu-gloo", (1 << 31) + 8, id="cuda", marks=GPU),
    ],
)
def test_rows_more_than_two_gigabytes_apart(transport: str, elements: int, far_source: bool) -> None:
    assert Ranks.get(1, transport).run(_far, elements, far_source, initialize=False) == [True]


def _copy_pairs(dtypes: Sequence[torch.dtype]) -> list[Any]:
    """Pairs of unequal word widths, turned axes and odd offsets, in one call of the copy that the device takes."""
    if _device().type == "cuda":
        from fvops.kernels.parts_copy import copy_parts
    else:
        from fvops.kernels.parts_torch import copy_parts

    shapes = [(3, 4, 5), (7,), (2, 3, 1, 16), (33, 64)]
    pairs = [
        (make(shape, dtype, layout, i), make(shape, dtype, other, i + 50))
        for i, (shape, dtype, layout, other) in enumerate(
            zip(shapes, dtypes, ["strided", "offset", "transposed", "expanded"], reversed(LAYOUTS[:4]), strict=True)
        )
    ]
    sources = [on_device(source, _device()) for source, _ in pairs]
    destinations = [on_device(destination, _device()) for _, destination in pairs]
    copy_parts(sources, destinations)
    return [
        dtype
        for dtype, (source, _), got in zip(dtypes, pairs, destinations, strict=True)
        if not torch.equal(bits(got.cpu()), bits(source))
    ]


@pytest.mark.parametrize("first", range(0, len(ALL_DTYPES), 2))
def test_pairs_of_any_kind_in_one_call(worker: Ranks, first: int) -> None:
    dtypes = [ALL_DTYPES[(first + i) % len(ALL_DTYPES)] for i in range(4)]
    assert worker.run(_copy_pairs, dtypes, initialize=False) == [[]]
