"""Compiled artifacts on disk must not outlive the ops they were compiled for.

Inductor's and AOTAutograd's cache keys hold the graph and Inductor's configuration, but nothing of what a custom op's
fake, gradient or lowering does. And AOTAutograd by-passes its cache for graphs with effects unless ``with_effects`` is
marked cacheable. One configuration entry serves both ends: the mark, whose value is part of every key, is our salt.

Checked on torch 2.11 and 2.13; `compile_tests/test_caches.py` fails when the mark or its place in the key goes away.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from fvops._version import __version__

__all__ = ["salt", "salt_caches"]

_WITH_EFFECTS = "torch.ops.higher_order.with_effects"


@functools.cache
def salt() -> str:
    """Identifies this version of the ops: the package's version and a digest of all code that shapes a graph."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(
        path for pattern in ("ops/*.py", "compiler/*.py", "checks.py") for path in package.glob(pattern)
    ):
        digest.update(path.read_bytes())
    return f"fvops-{__version__}-{digest.hexdigest()[:16]}"


def salt_caches() -> None:
    """Put the salt into the compile caches' keys. Called at each trace: a program may have replaced the dict since."""
    from torch._inductor import config

    if config.unsafe_marked_cacheable_functions.get(_WITH_EFFECTS) != salt():
        config.unsafe_marked_cacheable_functions = {**config.unsafe_marked_cacheable_functions, _WITH_EFFECTS: salt()}
