"""Promise 4: one cache folder for all worlds, ranks and versions, and nobody is served another's artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fvops
from compile_tests.programs import compare, example
from fvops.compiler import cache
from tests.harness import Ranks


def _program(x: Tensor) -> Tensor:
    """An exchange, and the two ops whose graph depends on the rank."""
    group = fvops.get_sp_group()
    heads = group.all_to_all_4D(x.sin(), 2, 1)
    gathered = group.gather(heads.detach(), 1, 1)
    mine = group.shard(heads, 1, scale_grad=False)
    result = group.all_to_all_4D(mine + 1, 1, 2) if mine.size(1) % group.world_size == 0 else mine
    return result if gathered is None else result + gathered.mean()


def _compile_and_count(train: bool) -> dict[str, int]:
    """Run the program compiled, compare it with eager, and say how the caches were used."""
    from torch._dynamo.utils import counters

    counters.clear()
    group = fvops.get_sp_group()
    with torch.set_grad_enabled(train):
        compiled = torch.compile(_program, fullgraph=True)
        compare("cached program", _program, compiled, example(group.world_size, group.rank_in_group), train)
    return {
        "autograd_hit": counters["aot_autograd"]["autograd_cache_hit"],
        "autograd_miss": counters["aot_autograd"]["autograd_cache_miss"],
        "autograd_bypass": counters["aot_autograd"]["autograd_cache_bypass"],
        "inductor_miss": counters["inductor"]["fxgraph_cache_miss"],
    }


def _with_version(version: str) -> dict[str, int]:
    cache.salt.cache_clear()
    real, cache.__version__ = cache.__version__, version
    try:
        return _compile_and_count(False)
    finally:
        cache.__version__ = real
        cache.salt.cache_clear()
        cache.salt_caches()


def _with_schema_file(text: str, folder: str) -> dict[str, int]:
    """As if the package's code were other than it is: the salt is taken from a copy with one file changed."""
    copy = Path(folder) / "fvops" / "compiler"
    (copy.parent / "ops").mkdir(parents=True, exist_ok=True)
    copy.mkdir(exist_ok=True)
    (copy.parent / "checks.py").write_text("")
    (copy.parent / "ops" / "all_reduce.py").write_text(text)
    cache.salt.cache_clear()
    real, cache.__file__ = cache.__file__, str(copy / "cache.py")
    try:
        return _compile_and_count(False)
    finally:
        cache.__file__ = real
        cache.salt.cache_clear()
        cache.salt_caches()


def _was_hit(counts: dict[str, Any]) -> bool:
    return counts["autograd_hit"] >= 1 and counts["autograd_miss"] == 0 and counts["inductor_miss"] == 0


def _was_compiled(counts: dict[str, Any]) -> bool:
    return counts["autograd_miss"] >= 1 and counts["autograd_hit"] == 0


@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["inference", "training"])
def test_worlds_and_ranks_share_a_cache_folder(tmp_path: Path, train: bool) -> None:
    folder = str(tmp_path)
    first = Ranks.get(2).run(_compile_and_count, train, cache=folder, deadline_s=180)
    assert all(_was_compiled(counts) for counts in first), first
    larger = Ranks.get(4).run(_compile_and_count, train, cache=folder, deadline_s=180)
    # Ranks 0 and 2 or 2 and 3 may not find what another rank left: shard and gather name the rank.
    assert all(_was_compiled(counts) for counts in larger), larger
    again = Ranks.get(2).run(_compile_and_count, train, cache=folder, deadline_s=180)
    assert all(_was_hit(counts) for counts in again), again


def test_new_processes_are_served_from_the_cache(tmp_path: Path) -> None:
    Ranks.get(2).run(_compile_and_count, False, cache=str(tmp_path), deadline_s=180)
    Ranks.get(2).kill()
    counts = Ranks.get(2).run(_compile_and_count, False, cache=str(tmp_path), deadline_s=180)
    assert all(_was_hit(count) for count in counts), counts


def test_another_version_or_schema_never_hits(tmp_path: Path) -> None:
    pool, folder = Ranks.get(2), str(tmp_path / "cache")
    pool.run(_compile_and_count, False, cache=folder, deadline_s=180)
    newer = pool.run(_with_version, "999.0", cache=folder, deadline_s=180)
    assert all(_was_compiled(counts) for counts in newer), newer
    for text in ("schema A", "schema B"):
        changed = pool.run(_with_schema_file, text, str(tmp_path / "copy"), cache=folder, deadline_s=180)
        assert all(_was_compiled(counts) for counts in changed), changed
    back = pool.run(_compile_and_count, False, cache=folder, deadline_s=180)
    assert all(_was_hit(counts) for counts in back), back
