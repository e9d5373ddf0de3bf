"""Compiled artifacts on disk must not outlive the ops and the passes they were compiled with.

Inductor's and AOTAutograd's cache keys hold the graph and Inductor's configuration, but nothing of what a custom op's
fake, gradient or lowering does. And AOTAutograd by-passes its cache for graphs with effects unless ``with_effects`` is
marked cacheable. One configuration entry serves all ends: the mark, whose value is part of every key, is our salt, and
the place where the passes find their switches.

Checked on torch 2.11 and 2.13; `compile_tests/test_caches.py` fails when the mark or its place in the key goes away.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from fvops._version import __version__
from fvops.compiler.switches import Switches, chosen

__all__ = ["mark", "pinned", "salt", "salt_caches", "switches_in_force"]

_WITH_EFFECTS = "torch.ops.higher_order.with_effects"
# Between salt and switches, where the switches are those of one function: `salt_caches` leaves them alone.
_PINNED = "options"


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


def mark(switches: Switches) -> str:
    """The configuration entry's value: salt and switches."""
    return f"{salt()};;{switches.text}"


def salt_caches() -> None:
    """Put salt and switches into the compile caches' keys. Called at each trace: a program may have replaced the dict.

    The switches that a function was compiled with by its own options stay.
    """
    from torch._inductor import config

    marks = config.unsafe_marked_cacheable_functions
    wanted, found = mark(chosen()), marks.get(_WITH_EFFECTS, "")
    if found != wanted and not found.startswith(f"{salt()};{_PINNED};"):
        config.unsafe_marked_cacheable_functions = {**marks, _WITH_EFFECTS: wanted}


def pinned(switches: Switches) -> dict[str, Any]:
    """Configuration under which a function is compiled with `switches`, whatever the process has chosen."""
    from torch._inductor import config

    value = f"{salt()};{_PINNED};{switches.text}"
    return {"unsafe_marked_cacheable_functions": {**config.unsafe_marked_cacheable_functions, _WITH_EFFECTS: value}}


def switches_in_force() -> Switches:
    """The switches for what is being compiled, as the caches' keys hold them."""
    from torch._inductor import config

    found = config.unsafe_marked_cacheable_functions.get(_WITH_EFFECTS, "")
    # Without our entry the caches do not know of the passes: then none may run.
    return Switches.parse(found.rsplit(";", 1)[1]) if found.startswith(f"{salt()};") else Switches("exchange")
