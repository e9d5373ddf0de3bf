"""Promises 5 and 6: shapes may change, and groups may, without compiling anew."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import fvops
from compile_tests.programs import TOLERANCE
from tests.harness import Ranks, init_fvops

# Local sequence lengths: distinct from every other dim (B=1, H=12, D=5, P), odd ones included.
LENGTHS = (21, 33, 14, 27, 39, 50, 17, 64)


def _ulysses(x: Tensor) -> Tensor:
    """Exchange, some attention-like work over the whole sequence, and back."""
    group = fvops.get_sp_group()
    whole = group.all_to_all_4D(x.sin(), 2, 1)
    mixed = whole * whole.mean(dim=1, keepdim=True).softmax(-1)
    return group.all_gather(group.all_to_all_4D(mixed, 1, 2), 1) * 2


def _graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def _lengths(dynamic: bool | None, backend: str, train: bool) -> int:
    """How many graphs eight lengths took."""
    counters.clear()
    # How often is compiled does not depend on what Inductor makes of the arithmetic; aten calls take no C++ compiler.
    options = {"fallback_by_default": True} if backend == "inductor" else None
    compiled = torch.compile(_ulysses, fullgraph=True, dynamic=dynamic, backend=backend, options=options)
    for length in LENGTHS:
        x = torch.rand(1, length, 12, 5, requires_grad=train)
        y = x.detach().clone().requires_grad_(train)
        got, expected = compiled(x), _ulysses(y)
        torch.testing.assert_close(got, expected, **TOLERANCE)
        if train:
            got.cos().sum().backward()
            expected.cos().sum().backward()
            torch.testing.assert_close(x.grad, y.grad, **TOLERANCE)
    return _graphs()


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (None, 2)], ids=["dynamic", "default"])
@pytest.mark.parametrize(("world_size", "backend"), [(2, "inductor"), (3, "aot_eager")])
def test_eight_sequence_lengths(world_size: int, backend: str, dynamic: bool | None, graphs: int, train: bool) -> None:
    took = Ranks.get(world_size).run(_lengths, dynamic, backend, train, deadline_s=240)
    assert took == [graphs] * world_size


def _reinitialize(backend: str) -> tuple[int, int, str, str]:
    """Graphs before and after destroy and re-initialization, and the group's name in both lives."""
    counters.clear()
    x = torch.rand(1, 6, 12, 5)
    compiled = torch.compile(_ulysses, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), _ulysses(x), **TOLERANCE)
    before, name = _graphs(), fvops.get_sp_group().unique_name
    for life in range(2):
        fvops.cleanup_dist_env_and_memory()
        init_fvops(suffix=f"-life{life}")
        torch.testing.assert_close(compiled(x), _ulysses(x), **TOLERANCE)
    return before, _graphs(), name, fvops.get_sp_group().unique_name


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_compiled_functions_outlive_their_groups(world_size: int, backend: str) -> None:
    for before, after, name, new_name in Ranks.get(world_size).run(_reinitialize, backend, deadline_s=180):
        assert (before, after) == (1, 1)
        assert name == new_name == "sp:0"


def _size_of_current_group(x: Tensor) -> Tensor:
    group = fvops.get_sp_group()
    return group.all_gather(x.sin(), 0) * group.world_size


def _patch(backend: str) -> tuple[list[int], int]:
    """Results' lengths outside, inside and after a patch, and the graphs it took to go back and forth three times."""
    counters.clear()
    small = fvops.initialize_sequence_parallel_group(2, group_name_suffix="small")
    compiled = torch.compile(_size_of_current_group, fullgraph=True, backend=backend)
    x = torch.rand(3, 4)
    lengths = []
    for _ in range(3):
        lengths.append(compiled(x).size(0))
        with fvops.parallel_state.patch_sequence_parallel_group(small):
            torch.testing.assert_close(compiled(x), _size_of_current_group(x), **TOLERANCE)
            lengths.append(compiled(x).size(0))
    torch.testing.assert_close(compiled(x), _size_of_current_group(x), **TOLERANCE)
    small.destroy()
    return lengths, _graphs()


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_patched_group_is_used_inside_and_only_there(backend: str) -> None:
    for lengths, graphs in Ranks.get(4).run(_patch, backend, deadline_s=180):
        assert lengths == [12, 6] * 3
        assert graphs == 2


def _patch_inside(backend: str) -> None:
    small = fvops.initialize_sequence_parallel_group(2, group_name_suffix="small")

    def function(x: Tensor) -> Tensor:
        with fvops.parallel_state.patch_sequence_parallel_group(small):
            inner = _size_of_current_group(x)
        return inner.sum() + _size_of_current_group(x)

    x = torch.rand(3, 4)
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend=backend)(x), function(x), **TOLERANCE)
    small.destroy()


def test_patching_inside_the_compiled_function() -> None:
    Ranks.get(4).run(_patch_inside, "aot_eager", deadline_s=180)


def _call_after_destroy(compile_it: Callable[..., Callable[[Tensor], Tensor]] = torch.compile) -> str:
    group = fvops.initialize_sequence_parallel_group(2, group_name_suffix="gone")
    compiled = compile_it(lambda x: group.all_reduce(x), backend="aot_eager", fullgraph=True)
    compiled(torch.ones(2))
    group.destroy()
    try:
        compiled(torch.ones(2))
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_compiled_call_on_a_destroyed_group_names_it(two_ranks: Ranks) -> None:
    for text in two_ranks.run(_call_after_destroy):
        assert "group 'sp_gone:0' was destroyed" in text
