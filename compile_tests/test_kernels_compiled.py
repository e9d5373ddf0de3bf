"""What the Triton kernel becomes on GPUs that are not here: access widths, registers and spills of the compiled code.

Each test compiles what the launcher would launch (`parts_copy.kernel_calls`), with the specialisation that triton
itself derives from those arguments: only the driver is a stand-in that names a target. `python -m
compile_tests.test_kernels_compiled` prints the table of docs/kernels.md.
"""

from __future__ import annotations

import collections
import functools
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fvops.kernels import layout

triton = pytest.importorskip("triton")

# name -> the arguments of triton's GPUTarget
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
NVIDIA = [name for name in TARGETS if name.startswith("sm_")]
# With 40, 48 of the 64 warps that an A100's, H100's or B200's multiprocessor can hold share its 65536 registers; all of
# them with 32, which triton 3.7 stays within (3.6 takes 34 in some).
MOST_REGISTERS = 40

# name -> (S/P, heads of q, k and v, D, P, dtype)
SHAPES = {
    "Wan 1.3B, bf16, P=4": (8190, (12, 12, 12), 128, 4, torch.bfloat16),
    "Wan 14B, fp8, P=8": (4095, (40, 40, 40), 128, 8, torch.float8_e4m3fn),
    "q only, D=64, H=P, bf16": (4096, (8,), 64, 8, torch.bfloat16),
    "grouped k and v, float32": (1000, (16, 4, 4), 80, 4, torch.float32),
    "complex128": (100, (4, 4, 4), 3, 4, torch.complex128),
}


class _Target:
    """All that compiling asks of a triton driver. Every target has its own device number: caches go by it."""

    def __init__(self, name: str) -> None:
        self._number = list(TARGETS).index(name)
        self._target = triton.backends.compiler.GPUTarget(*TARGETS[name])

    def get_current_device(self) -> int:
        return self._number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


def _compiled(name: str, sources: Sequence[Tensor], destinations: Sequence[Tensor]) -> list[Any]:
    """The kernels that copying the pairs would launch on target `name`."""
    from fvops.kernels import parts_copy

    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_Target(name))
    try:
        return [
            parts_copy._copy_parts.warmup(*arguments, grid=(programs,), **keywords)
            for programs, arguments, keywords in parts_copy.kernel_calls(
                sources, destinations, parts_copy.DEFAULT_CONFIG
            )
        ]
    finally:
        driver._active = before


def _pairs(shape: str, by_heads: bool, offset: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """The strided views of q, k and v, `offset` elements into their memory, and contiguous buffers."""
    s, heads, D, P, dtype = SHAPES[shape]
    views = []
    for H in heads:
        dims = (1, s, H, D) if by_heads else (2, P * s, H // P, D)
        count = torch.Size(dims).numel()
        x = torch.empty(count + offset, dtype=dtype)[offset:].view(dims)
        views.append((layout.heads_by_rank if by_heads else layout.sequence_by_rank)(x, P))
    return views, [torch.empty(view.shape, dtype=dtype) for view in views]


@functools.cache
def _exchange(name: str, shape: str, way: str, offset: int = 0) -> Any:
    """The one kernel of packing by heads (`way` "pack") or of laying down sequences at B=2 ("unpack")."""
    views, buffers = _pairs(shape, way == "pack", offset)
    (kernel,) = _compiled(name, views, buffers) if way == "pack" else _compiled(name, buffers, views)
    return kernel


def _accesses(kernel: Any) -> tuple[collections.Counter[str], collections.Counter[str]]:
    """Loads and stores of global memory by their width, as the assembler spells it."""
    text = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    pattern = r"\b(ld|st)\.global\.(\S+)" if "ptx" in kernel.asm else r"\bglobal_(load|store)_(\w+)"
    found = re.findall(pattern, text)
    return (
        collections.Counter(width for way, width in found if way in ("ld", "load")),
        collections.Counter(width for way, width in found if way in ("st", "store")),
    )


def _registers_and_spills(kernel: Any, folder: Path) -> tuple[int, int]:
    """Registers of a thread and bytes (AMD: registers) spilled, as the assembler reports them."""
    if "ptx" not in kernel.asm:
        text = kernel.asm["amdgcn"]
        (registers,) = re.findall(r"\.vgpr_count:\s+(\d+)", text)
        return int(registers), sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text)))
    (arch,) = re.findall(r"^\.target (\w+)", kernel.asm["ptx"], re.MULTILINE)
    assembler = "ptxas-blackwell" if arch.startswith("sm_10") else "ptxas"
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / assembler
    (folder / "kernel.ptx").write_text(kernel.asm["ptx"])
    command = [str(path), "-v", "--gpu-name", arch, "kernel.ptx", "-o", "kernel.cubin"]
    report = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    assert len(spills) == 2, report
    return int(registers), sum(map(int, spills))


_WIDE_NVIDIA = {"v2.b64", "v4.b32"}
_WIDE = {name: _WIDE_NVIDIA if name in NVIDIA else {"dwordx4"} for name in TARGETS}


@pytest.fixture(scope="module", autouse=True)
def _fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that an earlier run compiled is looked at."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


# The targets of one maker differ little: one of each for every shape, the others for one shape.
@pytest.mark.parametrize("way", ["pack", "unpack"])
@pytest.mark.parametrize(
    ("shape", "name"),
    [
        (shape, name)
        for shape in SHAPES
        for name in TARGETS
        if name in ("sm_90", "gfx942") or shape.startswith("Wan 1.3B")
    ],
)
def test_aligned_exchanges_move_sixteen_bytes_at_a_time_and_spill_nothing(
    shape: str, name: str, way: str, tmp_path: Path
) -> None:
    kernel = _exchange(name, shape, way)
    loads, stores = _accesses(kernel)
    assert loads, "no load of global memory was found: has the assembler's spelling changed?"
    assert set(loads) <= _WIDE[name], loads
    assert set(stores) <= _WIDE[name], stores
    # A thread's loads are all under way before its first store: 8 KiB over 128 threads, or 256 where a warp has 64.
    tensors = len(SHAPES[shape][1])
    assert loads == stores
    assert loads.total() == tensors * (4 if name in NVIDIA else 2)
    registers, spills = _registers_and_spills(kernel, tmp_path)
    assert spills == 0
    assert registers <= MOST_REGISTERS


@pytest.mark.parametrize(("offset", "nvidia"), [(4, "b64"), (2, "b32"), (1, "b16")])
def test_the_check_can_fail_unaligned_addresses_are_moved_in_narrower_words(offset: int, nvidia: str) -> None:
    loads, _ = _accesses(_exchange("sm_90", "Wan 1.3B, bf16, P=4", "pack", offset))
    assert set(loads) == {nvidia}


def test_no_division_for_each_row_or_element() -> None:
    """Two divisions a tensor (columns, ranks), all of the program's number, and none of a thread's."""
    for way in ("pack", "unpack"):
        text = _exchange("sm_90", "Wan 1.3B, bf16, P=4", way).asm["ttgir"]
        divisions = re.findall(r"arith\.(?:div|rem)\w+ .*", text)
        assert divisions
        assert all(line.rstrip().split(" : ")[1].startswith(("i32", "i64")) for line in divisions), divisions


def test_new_sequence_lengths_need_few_kernels() -> None:
    """Two things of a Wan model's kernel depend on the length: do 16 divide the rows, and the number of programs."""
    hashes = set()
    for s in (100, 1001, 1008, 4095, 8190, 8192, 8193, 18900):
        views = [layout.heads_by_rank(torch.empty(1, s, 12, 128, dtype=torch.bfloat16), 4) for _ in range(3)]
        (kernel,) = _compiled("sm_90", views, [torch.empty(view.shape, dtype=view.dtype) for view in views])
        hashes.add(kernel.hash)
    assert len(hashes) <= 4


# The one-sided exchange -------------------------------------------------------------------------------------------


@functools.cache
def _one_sided(name: str, shape: str) -> tuple[Any, Any]:
    """The push and the take of q, k and v by heads on target `name`."""
    from fvops.kernels import parts_copy, push, push_plan

    s, heads, D, P, dtype = SHAPES[shape]
    inputs = [layout.heads_by_rank(torch.empty(1, s, H, D, dtype=dtype), P) for H in heads]
    outputs = [layout.sequence_by_rank(torch.empty(1, P * s, H // P, D, dtype=dtype), P) for H in heads]
    slot_bytes = 1 << 28
    words = torch.zeros(push_plan.slots_start(P) // 8, dtype=torch.int64)
    room = push_plan.Room(words, torch.zeros(P, dtype=torch.int64), torch.empty(16, dtype=torch.uint8), slot_bytes, 1)
    config = parts_copy.DEFAULT_CONFIG
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_Target(name))
    try:
        ((pushed, arguments, keywords),) = push.push_calls(room, outputs, inputs, config)
        first = push._push.warmup(*arguments, grid=(pushed,), **keywords)
        ((taken, arguments, keywords),) = push.take_calls(room, outputs, config)
        return first, push._take.warmup(*arguments, grid=(taken,), **keywords)
    finally:
        driver._active = before


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        *(("Wan 1.3B, bf16, P=4", name) for name in TARGETS),
        ("complex128", "sm_90"),
        ("grouped k and v, float32", "sm_90"),
    ],
)
def test_a_push_moves_sixteen_bytes_at_a_time_straight_into_the_peers(shape: str, name: str, tmp_path: Path) -> None:
    (wide,) = _WIDE[name] & {"v2.b64", "dwordx4"}
    for kernel in _one_sided(name, shape):
        loads, stores = _accesses(kernel)
        data = len(SHAPES[shape][1]) * (4 if name in NVIDIA else 2)
        assert loads[wide] == stores[wide] == data
        # The rest are words and addresses: one of each a program, or a few in the last one.
        narrow = {"b64", "sys.acquire.b64", "acquire.sys.b64"} if name in NVIDIA else {"dwordx2"}
        assert set(loads) <= {wide} | narrow, loads
        assert set(stores) <= {wide} | narrow, stores
        assert stores.total() - data <= 4
        registers, spills = _registers_and_spills(kernel, tmp_path)
        assert spills == 0
        assert registers <= MOST_REGISTERS


@pytest.mark.parametrize("name", NVIDIA)
def test_signals_are_released_and_acquired_at_system_scope(name: str) -> None:
    ptx = _one_sided(name, "Wan 1.3B, bf16, P=4")[0].asm["ptx"]
    lines = [line.strip() for line in ptx.splitlines()]
    released = [i for i, line in enumerate(lines) if "atom" in line and "release" in line and "exch" in line]
    acquired = [i for i, line in enumerate(lines) if "acquire" in line and "sys" in line]
    tickets = [i for i, line in enumerate(lines) if "atom" in line and "acq_rel" in line]
    assert len(released) == 4  # one for each peer
    assert all("sys" in lines[i] for i in released)
    assert acquired
    (ticket,) = tickets
    last_store = max(i for i, line in enumerate(lines) if "st.global.v2" in line)
    barriers = [i for i, line in enumerate(lines) if line.split(" ")[0].startswith(("bar.sync", "barrier.sync"))]
    # Stores, barrier, ticket, flags, waits: in this order.
    assert any(last_store < barrier < ticket for barrier in barriers)
    assert last_store < ticket < min(released) <= max(released) < min(acquired)


def _table() -> None:
    """What docs/kernels.md shows."""
    import tempfile

    print(f"triton {triton.__version__}\n")
    print("| shape | target | loads | stores | registers | spilled |\n|---|---|---|---|---|---|")
    for shape in SHAPES:
        for name in TARGETS:
            kernel = _exchange(name, shape, "pack")
            loads, stores = (" ".join(f"{n} x {width}" for width, n in c.items()) for c in _accesses(kernel))
            with tempfile.TemporaryDirectory() as folder:
                registers, spills = _registers_and_spills(kernel, Path(folder))
            print(f"| {shape} | {name} | {loads} | {stores} | {registers} | {spills} |")


if __name__ == "__main__":
    _table()
