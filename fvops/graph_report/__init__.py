"""`fvops.report`: what torch.compile makes of a function: graphs, collectives, layout kernels, and what they may cost.

`docs/graph-report.md` says what is counted and how. Importing this imports neither Dynamo nor Inductor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fvops.graph_report.contents import Break, Collective, Graph, Kernel, Machine, Outside, Report
from fvops.graph_report.estimate import timed
from fvops.graph_report.planning import PlannedGroup, is_planning, planned_groups

__all__ = [
    "Break",
    "Collective",
    "Graph",
    "Kernel",
    "Machine",
    "Outside",
    "PlannedGroup",
    "Report",
    "planned_groups",
    "report",
]


def report(
    fn: Callable[..., Any],
    *args: Any,
    backward: bool = False,
    execute: bool | None = None,
    dynamic: bool | None = None,
    options: dict[str, Any] | None = None,
    machine: Machine | None = None,
    bandwidth_gb_s: float | None = None,
    **kwargs: Any,
) -> Report:
    """Compile ``fn(*args, **kwargs)`` and tell what came of it: `Report.text()`, `.json()`, `.html()`, `.save(path)`.

    Runs `fn` once, through the captured graphs: on every rank alike where it is executed, for it sends then what any
    call sends. `fn` itself stays uncompiled. An error of `fn` is raised as torch.compile raises it.

    Args:
        fn: a function or an nn.Module.
        backward: also run and report the backward pass; gradients are dropped. Otherwise `fn` runs under no_grad.
        execute: run on the tensors given; False: on fakes of them, which computes and sends nothing, so that one
            process suffices. None: execute, unless groups are planned (`planned_groups`) or a tensor is fake or meta.
        dynamic: as for torch.compile.
        options: Inductor's configuration, as torch.compile's `options`.
        machine: the speeds that times are computed from.
        bandwidth_gb_s: in place of the machine's.

    Raises:
        TypeError: `fn` cannot be called.
        ValueError: `backward` and nothing requires a gradient; `execute` and there is nothing to run on.
    """
    if not callable(fn):
        raise TypeError(f"fvops.report: needs a function or a module, got a {type(fn).__name__}")
    machine = Machine() if machine is None else machine
    if bandwidth_gb_s is not None:
        machine = replace(machine, bandwidth_gb_s=bandwidth_gb_s)
    from fvops.graph_report.tracing import Watcher, call, fakes_in_place_of

    watcher = Watcher(options or {})
    execute = _decide(execute, fn, args, kwargs)
    if execute:
        breaks, outside, stopped = call(fn, args, kwargs, watcher, backward, dynamic)
    else:
        device = parallel_device()
        with fakes_in_place_of(fn, args, kwargs, device) as (fake_args, fake_kwargs):
            breaks, outside, stopped = call(fn, fake_args, fake_kwargs, watcher, backward, dynamic)
    return Report(
        name=getattr(fn, "__name__", type(fn).__name__),
        executed=execute,
        graphs=tuple(replace(graph, kernels=timed(graph.kernels, machine)) for graph in watcher.graphs),
        breaks=tuple(breaks),
        passes=tuple(watcher.passes),
        machine=machine,
        stopped=stopped,
        outside=tuple(outside),
    )


def parallel_device() -> torch.device:
    """Where meta tensors are taken to be: on the sequence-parallel group's device, else the CPU."""
    from fvops import parallel_state

    return torch.device("cpu") if parallel_state._SP is None else parallel_state._SP.device


def _decide(execute: bool | None, fn: Any, args: Any, kwargs: Any) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    from fvops.graph_report.tracing import tensors_in

    tensors = tensors_in(fn, args, kwargs)
    unreal = [tensor for tensor in tensors if tensor.is_meta or isinstance(tensor, FakeTensor)]
    if execute is None:
        return not unreal and not is_planning()
    if execute and (unreal or is_planning()):
        raise ValueError(
            "fvops.report(execute=True): cannot run with planned groups, or on fake or meta tensors "
            f"({len(unreal)} of {len(tensors)} are)"
        )
    return execute
