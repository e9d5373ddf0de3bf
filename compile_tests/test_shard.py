"""`shard` in compiled code: a slice inside the kernels that read it; the call itself in packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import fvops
from tests.harness import Ranks

_PROGRAMS: dict[str, Callable[[Tensor], Tensor]] = {
    "of an input": lambda x: fvops.get_sp_group().shard(x, -1, scale_grad=True),
    "of a view": lambda x: fvops.get_sp_group().shard(x.transpose(0, 1).sin(), 0, scale_grad=False).cos(),
    "of tensors put together": lambda x: fvops.get_sp_group().shard(torch.cat([x, x.exp()], 1), 1, scale_grad=True) * 2,
}


def _compiled(names: list[str], dynamic: bool) -> dict[str, tuple[int, int]]:
    """How often the forward code calls `shard`, and how many kernels it has; results and gradients are as eager's."""
    counts = {}
    for name in names:
        program = _PROGRAMS[name]
        torch._dynamo.reset()
        compiled = torch.compile(program, fullgraph=True, dynamic=dynamic)
        for columns in (12, 24):
            whole = torch.linspace(0, 1 + fvops.get_world_rank(), 5 * columns, dtype=torch.float64)
            x = whole.view(5, columns).requires_grad_()
            results = []
            for run in (program, compiled):
                result, code = run_and_get_code(run, x)
                (gradient,) = torch.autograd.grad(result.cos().sum(), x)
                results.append((result, gradient))
            torch.testing.assert_close(results[1], results[0])
            assert result.stride() == results[0][0].stride()
            assert result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
            if code:
                counts[name] = (code[0].count("fvops.shard"), code[0].count("async_compile.cpp_pybinding("))
    return counts


def test_a_part_is_read_out_of_the_whole(two_ranks: Ranks) -> None:
    assert two_ranks.run(_compiled, ["of tensors put together"], True) == [{"of tensors put together": (0, 1)}] * 2


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_program_at_other_world_sizes(world_size: int, dynamic: bool) -> None:
    expected = dict.fromkeys(_PROGRAMS, (0, 1))
    assert Ranks.get(world_size).run(_compiled, list(_PROGRAMS), dynamic, deadline_s=300) == [expected] * world_size


def _of_small_numbers() -> int:
    """How often the code calls `shard`; results are bitwise eager's."""
    bits = torch.arange(8, dtype=torch.uint8).view(2, 4)

    def program(x: Tensor) -> Tensor:
        return fvops.get_sp_group().shard(x.view(torch.float8_e8m0fnu), 1, scale_grad=False)

    result, code = run_and_get_code(torch.compile(program, fullgraph=True), bits)
    assert torch.equal(result.view(torch.uint8), program(bits).view(torch.uint8))
    return code[0].count("torch.ops.fvops.shard.default(")


def test_types_that_inductor_has_no_loops_for(two_ranks: Ranks) -> None:
    assert two_ranks.run(_of_small_numbers) == [1, 1]


class _Shard(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return fvops.get_sp_group().shard(x.sin(), 0, scale_grad=False)


def _packaged(file: str) -> None:
    if fvops.get_world_rank() == 0:
        program = torch.export.export(_Shard(), (torch.ones(4, 3),))
        torch._inductor.aoti_compile_and_package(program, package_path=file)
    fvops.get_sp_group().barrier()
    loaded = torch._inductor.aoti_load_package(file)
    x = torch.rand(4, 3)
    torch.testing.assert_close(loaded(x), _Shard()(x))


@pytest.mark.slow
def test_a_package_of_another_rank_is_refused(two_ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="made for place 0, but this is place 1"):
        two_ranks.run(_packaged, str(tmp_path / "shard.pt2"), deadline_s=300)
