"""A backward graph is compiled together with its forward graph, by the same thread.

AOTAutograd would compile it when it is first run: after an `enable` block has ended, and in whatever thread autograd
runs it, where torch 2.13's configuration is the default one, without our passes, partitions and cache keys. A rank
whose backward came to another thread would send another sequence than its peers. The price is the time to compile a
backward graph that is never run.

Checked on torch 2.11 and 2.13; `compile_tests/test_pass_switches.py` runs backward in another thread.
"""

from __future__ import annotations

from torch._functorch import config

__all__ = ["compile_with_forward"]


def compile_with_forward() -> None:
    """Called at each trace: the setting is this thread's, and the program may have changed it."""
    config.force_non_lazy_backward_lowering = True
