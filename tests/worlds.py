"""For workers that set fvops up in their own way: a world that is taken down again, whatever its sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tests import harness

__all__ = ["initialized", "tear_down"]


@contextlib.contextmanager
def initialized(tp_size: int = 1, sp_size: int | None = None, suffix: str = "") -> Iterator[None]:
    """fvops with these sizes inside, and nothing afterwards. Run with ``initialize=False``."""
    harness.init_fvops(tp_size, sp_size, suffix)
    yield
    tear_down()


def tear_down() -> None:
    """Wait for the other ranks, then clean up. Not run after an error: its processes are replaced anyway."""
    import fvops

    fvops.get_world_group().barrier()
    fvops.cleanup_dist_env_and_memory()
