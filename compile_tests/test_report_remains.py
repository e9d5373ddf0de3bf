"""fvops.report of a program with fvops' own ops, on real ranks: afterwards everything is as before."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters, graph_break_reasons

import fvops
from compile_tests.test_report import Attention, B, D, H, S
from fvops import parallel_state, registry
from fvops.compiler import switches
from fvops.debug import calls, canonical, record_collectives
from tests.harness import Ranks


def _values(config: Any) -> list[tuple[str, Any]]:
    """A configuration's values themselves, where it would hand out copies; of lists and dicts what they hold now."""
    found = []
    for name in config.save_config_portable(ignore_private_configs=False):
        value = functools.reduce(getattr, name.split("."), config)
        found.append((name, copy.copy(value) if isinstance(value, (dict, list, set)) else value))
    return found


def _left_behind(overlap: bool) -> list[str]:
    """What differs after a report of a program with exchanges, forward and backward, on this rank."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config
    from torch._inductor.graph import GraphLowering

    torch.manual_seed(0)
    module, x = Attention(), torch.randn(B, S // 2, H * D, requires_grad=True)

    def state() -> dict[str, Any]:
        configs = (inductor_config, functorch_config)
        return {
            "parameters": [id(parameter) for parameter in module.parameters()],
            "gradients": [parameter.grad for parameter in (*module.parameters(), x)],
            "lowering": GraphLowering.compile_to_module,
            "dynamo": (str(counters), len(graph_break_reasons)),
            **{f"{one.__name__}.{name}": value for one in configs for name, value in _values(one)},
            "groups": [getattr(parallel_state, name) for name in ("_WORLD", "_NODE", "_TP", "_SP", "_DP")],
            "registered": registry.registered_names(),
            "switches": switches.chosen(),
            "observers": list(calls.observers),
            "grad mode": torch.is_grad_enabled(),
        }

    with fvops.compiler.enable(overlap=overlap):
        # The first trace of one of our ops writes the salt and our passes into the configurations, once and for all.
        fvops.report(lambda x: fvops.get_sp_group().all_to_all_4D(x), torch.empty(B, S, H, D), execute=False)
        before = state()
        for execute in (False, True):
            fvops.report(module, x, backward=True, execute=execute)
        after = state()
        wrong = [name for name in before if before[name] != after[name]]

        # And what is compiled afterwards does what eager does.
        with record_collectives() as eager:
            wanted = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
        compiled = torch.compile(module, fullgraph=True)
        with record_collectives() as own:
            found = torch.autograd.grad(compiled(x).square().sum(), [x, *module.parameters()])
        torch.testing.assert_close(found, wanted)
        return wrong + (["sequence"] if canonical(own) != canonical(eager) else [])


@pytest.mark.parametrize("overlap", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_nothing_is_left_behind_by_exchanges(two_ranks: Ranks, overlap: bool) -> None:
    assert two_ranks.run(_left_behind, overlap, deadline_s=300) == [[], []]
