"""Where our passes run inside Inductor: one over the joint (or inference) graph, one over each graph that is lowered.

Both are always in their slots and look up at each graph which of them is on. Passes of the program that are in a slot
already run after ours.

Checked on torch 2.11 and 2.13; `compile_tests/test_internals.py` fails when the slots move.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._inductor import config, custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from fvops.compiler import cache

__all__ = ["take_slots"]


def take_slots() -> None:
    """Put our passes in front of what is in Inductor's slots. Called at each trace: a program may have set its own."""
    for slot, run in (("joint_custom_pre_pass", _on_joint_graph), ("post_grad_custom_post_pass", _on_lowered_graph)):
        found = getattr(config, slot)
        if not _holds(found, run):
            setattr(config, slot, _in_front_of(found, run))


def _on_joint_graph(graph: Graph) -> None:
    switches = cache.switches_in_force()
    if switches.cancel or switches.dead or switches.merge:
        from fvops.compiler.sizes import read_from_symbols

        read_from_symbols(graph)
    if switches.cancel:
        from fvops.compiler.cancel import cancel_inverses

        cancel_inverses(graph)
    if switches.dead:
        from fvops.compiler.dead import elide_unread

        elide_unread(graph)
    if switches.absorb:
        from fvops.compiler.absorb import read_slices

        read_slices(graph, switches.layout)


def _on_lowered_graph(graph: Graph) -> None:
    from fvops.compiler import absorb, dead, layout, merge, overlap
    from fvops.compiler.cancel import drop_elided

    switches = cache.switches_in_force()
    if switches.dead:
        dead.elide_unread(graph)
    drop_elided(graph)
    # Before merge: an exchange that absorb has opened up merges with others only if they are, too.
    layout.compute_layouts(graph, switches.layout)
    if switches.absorb:
        absorb.write_packed(graph)
    if switches.merge:
        merge.merge_exchanges(graph, switches.merge)
    if switches.overlap:  # after these: what it puts between start and wait are the pack and the unpack, too
        overlap.overlap_exchanges(graph, switches.overlap)
    if switches.absorb:
        absorb.sum_in_one_buffer(graph)


class _Pass(CustomGraphPass):
    """`run` as Inductor wants a pass, then the pass `then`. The caches' keys hold what both depend on."""

    def __init__(self, run: Callable[[Graph], None], then: Any = None) -> None:
        self.run = run
        self._then = then

    def __call__(self, graph: Graph) -> None:
        self.run(graph)
        if self._then is not None:
            self._then(graph)

    def uuid(self) -> Any:
        own = f"{cache.salt()};{cache.switches_in_force().text}"
        if self._then is None:
            return own
        # A pass that cannot be identified keeps its graphs out of the caches: so does ours then.
        theirs = self._then.uuid() if isinstance(self._then, CustomGraphPass) else None
        return None if theirs is None else (own, theirs)


def _holds(found: Any, run: Callable[[Graph], None]) -> bool:
    first = found[0] if isinstance(found, (list, tuple)) and found else found
    return isinstance(first, _Pass) and first.run is run


def _in_front_of(found: Any, run: Callable[[Graph], None]) -> Any:
    if found is None:
        return _Pass(run)
    # torch 2.11 takes one pass in a slot, torch 2.13 a sequence. Remove `then` once torch >= 2.13 is required.
    if not hasattr(custom_graph_pass, "get_custom_graph_passes"):
        return _Pass(run, found)
    return (_Pass(run), *found) if isinstance(found, (list, tuple)) else (_Pass(run), found)
