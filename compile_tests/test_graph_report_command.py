"""tools/graph_report.py on a program of the user's own, run as a user runs it: as a process, from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.user_program import callable_of, inputs_of, passes_of

SCRIPT = Path(__file__).parent.parent / "tools/graph_report.py"
PROGRAM = """
import torch
import torch.nn.functional as F
from torch import nn

import fvops


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        group = fvops.get_sp_group()
        q, k, v = (part.unflatten(2, (4, 16)) for part in self.qkv(x).chunk(3, dim=2))
        q, k, v = group.all_to_all_4D(q), group.all_to_all_4D(k), group.all_to_all_4D(v)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.out(group.all_to_all_4D(out.transpose(1, 2), 1, 2).flatten(2))


def arguments():
    return Block(), torch.empty(1, 8, 64)


def step(block, x):
    return block(x)


number = 3
"""


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "own_model.py").write_text(PROGRAM)
    command = [sys.executable, str(SCRIPT), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def _collectives(path: Path) -> list[tuple[str, int, int]]:
    graphs = json.loads(path.read_text())["graphs"]
    found = [kernel["collective"] for graph in graphs for kernel in graph["kernels"] if kernel["collective"]]
    return [(one["op"], one["world_size"], one["sent_bytes"]) for one in found]


def test_a_module_with_shapes_and_passes(tmp_path: Path) -> None:
    """q, k and v of 8 tokens a rank, 4 heads of 16, bfloat16; half of each leaves a rank of two."""
    arguments = ["own_model:Block", "--input", "1x8x64", "--ranks", "2", "--passes", "all", "--json", "out.json"]
    done = _run(tmp_path, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    nbytes = 8 * 64 * 4
    merged = [("all_to_all_4D_coalesced", 2, 3 * nbytes // 2), ("all_to_all_4D", 2, nbytes // 2)]
    assert _collectives(tmp_path / "out.json") == merged
    assert done.stdout.startswith("own_model:Block on 2 ranks, passes: all: 1 graph")
    assert "merge: 3 x all_to_all_4D as one exchange of 3 tensors, at " in done.stdout
    line = 1 + next(place for place, line in enumerate(PROGRAM.splitlines()) if "group.all_to_all_4D(q)" in line)
    assert f"own_model.py:{line} in forward" in done.stdout


@pytest.mark.slow
def test_a_file_s_function_with_inputs_of_its_own(tmp_path: Path) -> None:
    done = _run(
        tmp_path, "own_model.py:step", "--inputs", "own_model.py:arguments", "--ranks", "4", "--backward",
        "--json", "out.json", "--html", "out.html", "--passes", "layout=exchange",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    nbytes = 8 * 64 * 4
    assert _collectives(tmp_path / "out.json") == [("all_to_all_4D", 4, nbytes * 3 // 4)] * 8
    assert (tmp_path / "out.html").read_text().startswith("<!doctype html>")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["own_model:Block", "--input", "1x8x64", "--ranks", "3"], 1, "on 3 ranks is refused: fvops"),
        (["own_model:Block", "--model", "ltx", "--ranks", "2"], 2, "either a program or --model"),
        (["own_model:Black", "--ranks", "2"], 2, "there is no 'Black' in own_model"),
        (["own_model:Block", "--input", "1x8x64", "--ranks", "2", "--passes", "fuse"], 2, "'fuse' is none of all"),
    ],
    ids=["heads", "both", "no such name", "no such pass"],
)
def test_what_it_refuses(tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    done = _run(tmp_path, *arguments)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_names_that_name_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    # Names of modules that nothing else has imported.
    (tmp_path / "fvops_own_program.py").write_text(PROGRAM)
    (tmp_path / "fvops_own_importer.py").write_text("import fvops_nowhere\n")
    assert isinstance(callable_of("fvops_own_program:Block"), torch.nn.Module)
    for name, says in (
        ("fvops_own_program", "must be module:function"),
        ("fvops_own_elsewhere:step", "there is no module 'fvops_own_elsewhere'"),
        ("elsewhere.py:step", r"there is no file elsewhere\.py"),
        ("fvops_own_program:Block.nothing", "there is no 'nothing' in Block"),
        ("fvops_own_program:number", "is a int, which cannot be called"),
    ):
        with pytest.raises(ValueError, match=says):
            callable_of(name)
    # What a program of the user's lacks itself is not said to be a wrong name.
    with pytest.raises(ModuleNotFoundError, match="fvops_nowhere"):
        callable_of("fvops_own_importer:step")
    with pytest.raises(ValueError, match="must return a tuple or list"):
        inputs_of((), "fvops_own_program:Block", backward=False)


def test_inputs_as_written() -> None:
    x, index, number = inputs_of(("1x8x64:bfloat16", "3:int64", ""), None, backward=True)
    assert (x.shape, x.dtype, x.device.type, x.requires_grad) == ((1, 8, 64), torch.bfloat16, "meta", True)
    assert (index.shape, index.dtype, index.requires_grad) == ((3,), torch.int64, False)
    assert (number.shape, number.dtype) == ((), torch.float32)
    for wrong in ("1x-8", "1,8", "1x8:float7", "1x8:nn", "axb"):
        with pytest.raises(ValueError, match="must be sizes and perhaps a dtype"):
            inputs_of((wrong,), None, backward=False)


def test_passes_as_written() -> None:
    assert passes_of("") == []
    assert passes_of("all") == [{}]
    assert passes_of("all, layout=fused") == [{}, {"layout": "fused"}]
    assert passes_of("merge=1000,overlap,dead") == [{"merge": 1000, "overlap": True, "dead": True}]
    for wrong in ("everything", "cancel=1", "layout", "merge=", "merge=-1"):
        with pytest.raises(ValueError, match="--passes"):
            passes_of(wrong)
