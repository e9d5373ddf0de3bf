"""The NCCL bindings against the real library and its header, which need no GPU; and on one GPU where there is one.

`make test-nccl` fetches the library. Without one these are skipped.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fvops.device_communicators.library_loading import LibraryError, LibraryNotFoundError
from fvops.device_communicators.pynccl import PyNcclCommunicator
from fvops.device_communicators.pynccl_wrapper import DTYPES, IN_PROGRESS, REDUCTIONS, Config, NCCLLibrary, UniqueId
from tests.doubles.build import run_c
from tests.test_pynccl_lifecycle import Alone

pytestmark = pytest.mark.nccl

_DTYPE_NAMES = {
    torch.int8: "Int8", torch.uint8: "Uint8", torch.int32: "Int32", torch.uint32: "Uint32", torch.int64: "Int64",
    torch.uint64: "Uint64", torch.float16: "Float16", torch.float32: "Float32", torch.float64: "Float64",
    torch.bfloat16: "Bfloat16", torch.float8_e4m3fn: "Float8e4m3", torch.float8_e5m2: "Float8e5m2",
}  # fmt: skip
_REDUCTION_NAMES = {"sum": "Sum", "product": "Prod", "max": "Max", "min": "Min", "avg": "Avg"}

_PROGRAM = """
#include <stddef.h>
#include <stdio.h>
#include "nccl.h"
int main(void) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    printf("id %zu\\n", sizeof(ncclUniqueId));
    printf("size %zu\\n", offsetof(ncclConfig_t, size));
    printf("magic %zu\\n", offsetof(ncclConfig_t, magic));
    printf("version %zu\\n", offsetof(ncclConfig_t, version));
    printf("blocking %zu\\n", offsetof(ncclConfig_t, blocking));
    printf("magic_value %u\\n", config.magic);
    printf("config %zu\\n", sizeof config);
    printf("in_progress %d\\n", ncclInProgress);
    LINES
    return 0;
}
"""


@pytest.fixture(scope="module")
def nccl() -> NCCLLibrary:
    """The library, where there is one."""
    try:
        return NCCLLibrary()
    except LibraryNotFoundError as error:
        pytest.skip(f"no libnccl found ({error})")


@pytest.fixture(scope="module")
def header(nccl: NCCLLibrary) -> Path:
    """nccl.h of the same wheel."""
    path = Path(nccl.path).resolve().parent.parent / "include" / "nccl.h"
    if not path.exists():
        pytest.skip(f"no nccl.h beside {nccl.path}")
    return path


@pytest.fixture(scope="module")
def cuda_headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As much of CUDA's headers as nccl.h names."""
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "cuda_runtime.h").write_text(
        "typedef struct CUstream_st* cudaStream_t;\ntypedef struct CUevent_st* cudaEvent_t;\n"
    )
    for name in ("cuda_fp16.h", "cuda_bf16.h", "cuda_fp8.h"):
        (folder / name).write_text("")
    return folder


def test_it_has_every_function_that_is_bound(nccl: NCCLLibrary) -> None:
    for name in (*NCCLLibrary.FUNCTIONS, *NCCLLibrary.TEXTS):
        assert hasattr(nccl._library, name), name
    assert nccl.has("ncclAlltoAll") == (nccl.get_version() >= 22803)
    assert nccl.has("ncclCommFinalize")


def test_structures_and_numbers_are_those_of_its_header(header: Path, cuda_headers: Path) -> None:
    dtypes = {f"dtype_{name}": f"nccl{name}" for name in _DTYPE_NAMES.values()}
    reductions = {f"op_{name}": f"nccl{name}" for name in _REDUCTION_NAMES.values()}
    lines = "\n".join(f'printf("{key} %d\\n", (int){value});' for key, value in {**dtypes, **reductions}.items())
    text = run_c(_PROGRAM.replace("LINES", lines), [str(cuda_headers), str(header.parent)])
    found = {key: int(value) for key, value in (line.split() for line in text.splitlines())}
    assert found["id"] == ctypes.sizeof(UniqueId)
    for name in ("size", "magic", "version", "blocking"):
        assert found[name] == getattr(Config, name).offset, name
    assert found["magic_value"] == Config(0).magic
    assert found["config"] >= ctypes.sizeof(Config)
    assert found["in_progress"] == IN_PROGRESS
    for dtype, number in DTYPES.items():
        assert found[f"dtype_{_DTYPE_NAMES[dtype]}"] == number, dtype
    for op, number in REDUCTIONS.items():
        assert found[f"op_{_REDUCTION_NAMES[op]}"] == number, op


def _class_of(parameter: str) -> str:
    if "*" in parameter or re.search(r"\b(ncclComm_t|cudaStream_t)\b", parameter):
        return "pointer"
    if "size_t" in parameter:
        return "size"
    return "id" if "ncclUniqueId" in parameter else "int"


def _class_of_ctype(argument: Any) -> str:
    if argument is ctypes.c_size_t:
        return "size"
    if argument is UniqueId:
        return "id"
    return "int" if argument is ctypes.c_int else "pointer"


def test_arguments_are_those_of_its_header(header: Path, nccl: NCCLLibrary) -> None:
    prototypes = dict(re.findall(r"^(?:ncclResult_t|const char\*)\s+(nccl\w+)\(([^)]*)\);", header.read_text(), re.M))
    bound = {**NCCLLibrary.FUNCTIONS, **NCCLLibrary.TEXTS, **NCCLLibrary.OPTIONAL}
    for name, arguments in bound.items():
        if name in NCCLLibrary.OPTIONAL and not nccl.has(name):
            continue
        wanted = [_class_of(parameter) for parameter in prototypes[name].split(",") if parameter.strip()]
        assert [_class_of_ctype(argument) for argument in arguments] == wanted, name


def test_what_works_without_a_gpu(nccl: NCCLLibrary) -> None:
    assert nccl.get_version() >= 21400
    one, two = nccl.get_unique_id(), nccl.get_unique_id()
    assert len(one) == 128
    assert one != two
    assert nccl.get_error_string(0) == "no error"
    nccl.group_start()
    assert nccl.group_end() is False


def test_a_null_communicator_is_an_error_with_a_text(nccl: NCCLLibrary) -> None:
    for call in (nccl.comm_count, nccl.comm_user_rank, nccl.comm_get_async_error):
        with pytest.raises(LibraryError, match="failed with code 4: invalid argument") as caught:
            call(0)
        assert caught.value.code == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_initialisation_without_a_gpu_ends_in_an_error(nccl: NCCLLibrary) -> None:
    for start in (
        lambda: nccl.comm_init_rank(1, nccl.get_unique_id(), 0),
        lambda: nccl.comm_init_rank_config(1, nccl.get_unique_id(), 0, blocking=False),
    ):
        with pytest.raises(LibraryError, match=r"ncclCommInitRank(Config)? failed with code 1: unhandled cuda error"):
            start()
    with pytest.raises(
        RuntimeError, match=r"pynccl: initialisation of rank 0 of 1 on group .* failed: ncclCommInitRank"
    ):
        PyNcclCommunicator(Alone(), "cpu", nccl.path, allow_single_rank=True)
