"""Packing without Triton: who copies, what is not copied, what is refused, and how a copy is cut into programs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fvops.kernels import layout, parts_torch
from fvops.kernels.pack import pack, unpack
from fvops.kernels.parts_plan import CopyConfig, Launch, Pair, describe, plan
from tests.draws import ALL_DTYPES, LAYOUTS, bits, make, profile


@profile(40)
@given(
    st.integers(1, 4),
    st.sampled_from([1, 2, 3]),
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
    st.sampled_from(ALL_DTYPES),
    st.sampled_from(LAYOUTS),
    st.sampled_from([2, 1]),
)
def test_pack_and_unpack_on_cpu(P: int, B: int, heads: list[int], dtype: torch.dtype, how: str, dim: int) -> None:
    by_rank = layout.heads_by_rank if dim == 2 else layout.sequence_by_rank
    shapes = [(B, 5, P * h, 3) if dim == 2 else (B, P * h, 5, 3) for h in heads]
    inputs = [make(shape, dtype, how, seed) for seed, shape in enumerate(shapes)]
    views = [by_rank(x, P) for x in inputs]
    sends = pack(views)
    for h, x, view, send in zip(heads, inputs, views, sends, strict=True):
        assert (send is view) == view.is_contiguous()
        for r in range(P):
            mine = x[:, :, r * h : (r + 1) * h] if dim == 2 else x[:, r * h : (r + 1) * h]
            assert torch.equal(bits(send[r]), bits(mine))
    outputs = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    unpack(sends, [by_rank(output, P) for output in outputs])
    assert all(torch.equal(bits(x), bits(output)) for x, output in zip(inputs, outputs, strict=True))


def test_what_is_in_order_is_neither_copied_nor_launched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("nothing was to be copied")

    monkeypatch.setattr(parts_torch, "copy_parts", refuse)
    x = torch.randn(1, 8, 4, 2)
    view = layout.sequence_by_rank(x, 4)
    (send,) = pack([view], backend="torch")
    assert send.data_ptr() == x.data_ptr()
    unpack([layout.receive_buffer(view)], [view], backend="torch")
    assert pack([]) == []
    with pytest.raises(AssertionError, match="nothing was to be copied"):
        pack([layout.heads_by_rank(x, 4)], backend="torch")


def test_conjugated_views_are_packed_as_the_values_they_show() -> None:
    x = torch.randn(1, 4, 4, 2, dtype=torch.complex64)
    for by_rank in (layout.heads_by_rank, layout.sequence_by_rank):
        (send,) = pack([by_rank(x.conj(), 2)])
        assert not send.is_conj()
        assert torch.equal(torch.view_as_real(send), torch.view_as_real(by_rank(x, 2).clone()) * torch.tensor([1, -1]))


def test_refusals() -> None:
    x = torch.zeros(2, 3)
    y = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"1 received buffers but 2 parts"):
        unpack([x], [y, y])
    with pytest.raises(ValueError, match=r"unknown backend 'cuda'"):
        pack([x], backend="cuda")  # type: ignore[arg-type]
    for refused, kind, message in (
        (([x], []), ValueError, "1 sources but 0 destinations"),
        (([x], [y]), ValueError, r"pair 0: the source is \(2, 3\), the destination \(3, 2\)"),
        (([x, x], [x.clone(), x.double()]), TypeError, r"pair 1: the source is torch.float32, .* torch.float64"),
        (([x], [x.to("meta")]), ValueError, "pair 0 is on cpu and meta"),
        (([x], [torch.zeros(1, 3).expand(2, 3)]), ValueError, r"share memory \(shape \(2, 3\), strides \(0, 1\)\)"),
        (([x.to(torch.complex64).conj()], [x.to(torch.complex64)]), ValueError, r"resolve_conj\(\)"),
    ):
        with pytest.raises(kind, match=message):
            parts_torch.copy_parts(*refused)


def test_without_triton_the_package_imports_and_says_once_who_copies() -> None:
    program = """
import logging, sys
import fvops.kernels.pack as p
assert "triton" not in sys.modules, "imported eagerly"
sys.modules["triton"] = None
records = []
class Keep(logging.Handler):
    def emit(self, record):
        records.append((record.levelno, record.getMessage()))
logging.getLogger("fvops").addHandler(Keep())
logging.getLogger("fvops").setLevel(logging.INFO)
assert p._has_triton() is False and p._has_triton() is False
assert [level for level, text in records if "triton is not installed" in text] == [logging.INFO], records
import torch
x = torch.randn(1, 4, 2, 3)
from fvops.kernels import layout
view = layout.heads_by_rank(x, 2)
assert torch.equal(p.pack([view])[0], view)
try:
    p.pack([view], backend="triton")
except ImportError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "refused", done.stderr


# Plans -------------------------------------------------------------------------------------------------------------


def _heads_pair(S: int, H: int, D: int, P: int, itemsize: int = 2, alignment: int = 16) -> Pair:
    """The pack of a contiguous ``[1, S, H, D]`` by heads."""
    view = layout.heads_by_rank(torch.empty(1, S, H, D, device="meta"), P)
    return Pair(itemsize, tuple(view.shape), view.stride(), torch.empty_like(view.contiguous()).stride(), alignment)


def _one(*pairs: Pair) -> Launch:
    (launch,) = plan(pairs, CopyConfig())
    return launch


def test_wan_is_one_launch_of_full_blocks() -> None:
    for heads in (12, 40):
        launch = _one(*[_heads_pair(8190, heads, 128, 4)] * 3)
        assert (launch.indices, launch.word_bytes) == ((0, 1, 2), 16)
        moved = 3 * 8190 * heads * 128 * 2
        assert moved / (launch.programs * 1024 * 8) > 0.99
        assert launch.programs > 132 * 16  # more than an H100 holds at once
        assert launch.columns_per_block * 8 >= 128


def test_short_rows_share_a_program() -> None:
    launch = _one(_heads_pair(8192, 32, 64, 32))  # rows of 128 bytes
    assert (launch.columns_per_block, launch.rows_per_program) == (16, 64)


def test_a_row_is_cut_no_finer_than_a_cache_line() -> None:
    launch = _one(_heads_pair(8192, 8, 24, 8))  # rows of 48 bytes: three words, in a block of four
    assert launch.columns_per_block == 8


@pytest.mark.parametrize(("alignment", "word"), [(16, 16), (8, 8), (4, 4), (2, 2)])
def test_addresses_limit_the_word(alignment: int, word: int) -> None:
    assert _one(_heads_pair(8, 4, 64, 2, alignment=alignment)).word_bytes == word


def test_strides_and_rows_of_either_side_limit_the_word() -> None:
    wide, narrow = (5, 8), (24, 1)
    assert _one(Pair(2, wide, narrow, narrow, 16)).word_bytes == 16
    assert _one(Pair(2, wide, (12, 1), narrow, 16)).word_bytes == 8
    assert _one(Pair(2, wide, narrow, (10, 1), 16)).word_bytes == 4
    assert _one(Pair(2, (5, 7), narrow, narrow, 16)).word_bytes == 2
    assert _one(Pair(1, wide, narrow, narrow, 16)).word_bytes == 8
    assert _one(Pair(16, (5, 7), (7, 1), (9, 1), 16)).word_bytes == 16


def test_described_addresses() -> None:
    room = torch.empty(64, dtype=torch.uint8)
    room = room[-room.data_ptr() % 16 :]
    for offset, alignment in ((0, 16), (1, 1), (2, 2), (4, 4), (8, 8), (24, 8)):
        assert describe(room[offset : offset + 8], room[:8]).alignment == alignment
        assert describe(room[:8], room[offset : offset + 8]).alignment == alignment


def test_word_widths_are_launched_apart_and_empty_pairs_not_at_all() -> None:
    wide, odd = _heads_pair(8, 4, 64, 2), _heads_pair(8, 4, 3, 2)
    launches = plan((wide, odd, _heads_pair(0, 4, 64, 2), wide), CopyConfig())
    assert [(launch.word_bytes, launch.indices) for launch in launches] == [(16, (0, 3)), (4, (1,))]
    assert plan((_heads_pair(0, 4, 64, 2),), CopyConfig()) == ()


def test_too_many_programs_and_bad_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2147483649 programs are more than a grid takes"):
        plan((Pair(1, (2**31 + 1, 1024), (4099, 1), (2051, 1), 1),), CopyConfig())
    for size in (0, 1, 1000):
        with pytest.raises(ValueError, match=rf"power of two from 2 up, got {size}"):
            CopyConfig(elements_per_program=size)
