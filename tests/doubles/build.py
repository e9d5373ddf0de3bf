"""Compiles the doubles with the system's C compiler, once for each content of their sources.

The library lands in a folder of the temporary directory that is named after a digest of the sources and flags, so that
parallel processes and later runs share it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["build", "compiler", "run_c"]

_HERE = Path(__file__).parent
_FLAGS = ["-O2", "-g", "-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-function", "-fvisibility=hidden"]


def compiler() -> str:
    """The C compiler: ``$CC``, else cc or gcc; RuntimeError when there is none."""
    found = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if found is None:
        raise RuntimeError("no C compiler found: the NCCL and HCCL doubles need cc or gcc")
    return found


def build(name: str, defines: Sequence[str] = ()) -> str:
    """The path of the shared library of ``{name}.c``, compiled with ``-D`` for each of `defines`."""
    options = [*_FLAGS, *(f"-D{define}" for define in defines)]
    sources = [*sorted(_HERE.glob("*.h")), _HERE / f"{name}.c"]
    digest = hashlib.sha256(repr([compiler(), options]).encode())
    for source in sources:
        digest.update(source.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"fvops-doubles-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to somebody else")
    library = folder / f"{name}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            _run(
                [
                    compiler(),
                    *options,
                    "-shared",
                    "-fPIC",
                    str(sources[-1]),
                    "-o",
                    str(made),
                    "-lm",
                    "-lpthread",
                    "-lrt",
                ]
            )
            os.replace(made, library)  # whole or not at all: other processes may be looking
    return str(library)


def run_c(source: str, include: Sequence[str]) -> str:
    """What the C program `source` prints, compiled with the folders `include` on its search path."""
    with tempfile.TemporaryDirectory() as folder:
        file, program = Path(folder) / "program.c", Path(folder) / "program"
        file.write_text(source)
        _run([compiler(), *(f"-I{place}" for place in include), str(file), "-o", str(program)])
        return subprocess.run([program], capture_output=True, text=True, check=True, timeout=60).stdout


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
