"""How passes are switched, and that a switch is part of the compile caches' keys."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass

import fvops
from fvops.compiler import switches
from fvops.debug import canonical, record_collectives
from tests.harness import Ranks

DEFAULT = switches.Switches()
# Not `dead`: that is for those who ask for it.
ALL_ON = switches.Switches("auto", switches.MERGE_BYTES, True, switches.OVERLAP_BYTES, False, True)


@pytest.fixture(autouse=True)
def _as_it_was() -> Any:
    yield
    fvops.compiler.disable()


def test_enable_alone_is_everything_and_disable_the_default() -> None:
    assert switches.chosen() == DEFAULT == switches.Switches("auto", 0, False, 0, False, False)
    fvops.compiler.enable()
    assert switches.chosen() == ALL_ON
    fvops.compiler.enable(dead=True)
    fvops.compiler.enable()
    assert switches.chosen() == dataclasses.replace(ALL_ON, dead=True)  # asked for by name, and kept
    fvops.compiler.disable()
    assert switches.chosen() == DEFAULT


def test_what_is_named_is_changed_and_nothing_else() -> None:
    fvops.compiler.enable(merge=1 << 20)
    fvops.compiler.enable(cancel=True, layout="fused")
    assert switches.chosen() == switches.Switches("fused", 1 << 20, True)
    fvops.compiler.enable(merge=False)
    assert switches.chosen() == switches.Switches("fused", 0, True)
    fvops.compiler.enable(overlap=True)
    assert switches.chosen() == switches.Switches("fused", 0, True, switches.OVERLAP_BYTES)
    fvops.compiler.enable()
    assert switches.chosen().layout == "fused"


def test_a_block_puts_back_what_was_set() -> None:
    fvops.compiler.enable(merge=7)
    with fvops.compiler.enable(cancel=True):
        with fvops.compiler.enable(merge=True):
            assert switches.chosen() == switches.Switches("auto", switches.MERGE_BYTES, True)
        with fvops.compiler.enable(absorb=True):
            assert switches.chosen() == switches.Switches("auto", 7, True, absorb=True)
        assert switches.chosen() == switches.Switches("auto", 7, True)
    assert switches.chosen() == switches.Switches("auto", 7, False)
    with pytest.raises(KeyError), fvops.compiler.enable():
        raise KeyError
    assert switches.chosen() == switches.Switches("auto", 7, False)


@pytest.mark.parametrize("value", [DEFAULT, ALL_ON, switches.Switches("fused", 12345, True, 54321, True, True)])
def test_switches_are_read_back_from_their_text(value: switches.Switches) -> None:
    assert switches.Switches.parse(value.text) == value


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"layout": "packed"}, ValueError, "layout='packed': must be one of 'auto', 'fused', 'exchange'"),
        ({"merge": -1}, ValueError, "merge=-1: the limit in bytes cannot be negative"),
        ({"merge": "all"}, TypeError, "merge='all': must be a bool or a number of bytes"),
        ({"cancel": 1}, TypeError, "cancel=1: must be a bool"),
        ({"overlap": -1}, ValueError, "overlap=-1: the limit in bytes cannot be negative"),
        ({"overlap": "all"}, TypeError, "overlap='all': must be a bool or a number of bytes"),
        ({"dead": 1}, TypeError, "dead=1: must be a bool"),
        ({"absorb": "no"}, TypeError, "absorb='no': must be a bool"),
    ],
)
def test_bad_switches(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    for function in (fvops.compiler.enable, fvops.compiler.options):
        with pytest.raises(error, match=text):
            function(**arguments)
    assert switches.chosen() == DEFAULT


def test_enabling_imports_no_inductor() -> None:
    code = "import sys, fvops; fvops.compiler.enable(); sys.exit('torch._inductor.config' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def _pair(x: Tensor) -> Tensor:
    group = fvops.get_sp_group()
    y, z = group.all_to_all_4D(x, 2, 1), group.all_to_all_4D(x.sin(), 2, 1)
    return group.all_to_all_4D(y.cos(), 1, 2) + z.sum()


def _compiled(how: str) -> tuple[list[str], int, int]:
    """What `_pair` issues when compiled in the way `how`; hits and misses of AOTAutograd's cache."""
    from torch._dynamo.utils import counters

    counters.clear()
    torch._dynamo.reset()
    x = torch.rand(1, 4, 4, 2)
    named: dict[str, dict[str, Any]] = {
        "options": {"merge": True},
        "overlap": {"overlap": True},
        "dead": {"dead": True},
    }
    options = fvops.compiler.options(**named[how]) if how in named else None
    function = torch.compile(_pair, fullgraph=True, options=options)
    with record_collectives() as records:
        if how == "block":
            with fvops.compiler.enable():
                function(x)
        else:
            function(x)
    fvops.compiler.disable()
    counts = counters["aot_autograd"]
    return [op for _, op, _ in canonical(records)], counts["autograd_cache_hit"], counts["autograd_cache_miss"]


SINGLE, LIST = "all_to_all_4D", "all_to_all_4D_coalesced"
PLAIN, MERGED, ALL = [SINGLE] * 3, [LIST, SINGLE], [SINGLE]


def _in_turn(ways: list[str]) -> list[tuple[list[str], int, int]]:
    return [_compiled(how) for how in ways]


def test_no_switch_is_served_what_another_compiled(tmp_path: Path) -> None:
    """One folder: each way for the first time, then each again in new processes, which find what there is."""
    expected = {"plain": PLAIN, "options": MERGED, "block": ALL, "overlap": PLAIN, "dead": PLAIN}
    for hits, misses in ((0, 1), (1, 0)):
        for rank in Ranks.get(2).run(_in_turn, list(expected), cache=str(tmp_path), deadline_s=300):
            for how, (issued, *found) in zip(expected, rank, strict=True):
                assert issued == expected[how], how
                assert found == [hits, misses], how
        Ranks.get(2).kill()


def _backward_elsewhere() -> tuple[list[str], list[str]]:
    """What is issued, and which threads compile, with backward run after the block and in another thread.

    As autograd runs it for accelerators: that thread knows nothing of this one's configuration.
    """
    compiling: list[str] = []
    with torch._inductor.config.patch(post_grad_custom_pre_pass=_Seen(compiling)), record_collectives() as records:
        with fvops.compiler.enable(merge=True):
            loss = torch.compile(_pair, fullgraph=True)(torch.rand(1, 4, 4, 2, requires_grad=True)).sum()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join(150)
    return [op for _, op, _ in canonical(records)], compiling


class _Seen(CustomGraphPass):
    """Notes the thread in which each graph is lowered."""

    def __init__(self, threads: list[str]) -> None:
        self.threads = threads

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.threads.append(threading.current_thread().name)

    def uuid(self) -> str:
        return "seen"


def test_backward_is_compiled_with_forward(two_ranks: Ranks) -> None:
    for issued, compiling in two_ranks.run(_backward_elsewhere, deadline_s=200):
        assert issued == [LIST, SINGLE, SINGLE, LIST]
        assert compiling == ["MainThread"] * 2


@pytest.mark.slow
def test_another_thread_compiles_with_the_process_s_switches(two_ranks: Ranks) -> None:
    assert two_ranks.run(_in_a_thread, deadline_s=200)[0] == ALL


def _in_a_thread() -> list[str]:
    found: list[Any] = []
    fvops.compiler.enable()
    thread = threading.Thread(target=lambda: found.append(_compiled("plain")[0]))
    thread.start()
    thread.join(150)
    return found[0]
