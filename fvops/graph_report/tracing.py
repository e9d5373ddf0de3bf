"""Compiles a function and looks at its graphs: as a backend of torch.compile around Inductor that stops before code.

In place of Inductor's code the captured graphs themselves run, op by op, so that what follows a break is seen too. On
fake tensors nothing is computed or sent; on real ones everything is, on every rank alike.
"""

from __future__ import annotations

import contextlib
import copy
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters, graph_break_reasons
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fvops.compiler.log import PassNote, pass_log
from fvops.graph_report.contents import Break, Graph, Outside
from fvops.graph_report.outside import calls_outside_graphs
from fvops.graph_report.user_lines import is_user_s, line_of_stack

__all__ = ["Watcher", "call", "fakes_in_place_of", "modules_in", "tensors_in"]


class Watcher:
    """A backend that keeps a `Graph`, without times, for every graph that Inductor would generate code for.

    `passes` tells what fvops' passes did to each, a line a change.

    Args:
        options: Inductor's configuration while it lowers, as torch.compile's `options`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        # A cached graph would not be lowered; what is captured in a CUDA graph must be code.
        self.options = {**options, "force_disable_caches": True, "triton.cudagraphs": False}
        self.passes: list[str] = []
        self._graphs: list[Graph] = []
        self._runs: list[int] = []
        self._told: list[PassNote] = []
        self._count = 0
        self._running = 0

    @property
    def graphs(self) -> list[Graph]:
        """With how often each has run until now."""
        return [replace(graph, runs=runs) for graph, runs in zip(self._graphs, self._runs, strict=True)]

    def is_running(self) -> bool:
        """Is one of the captured graphs running?"""
        return self._running > 0

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        from torch._inductor import compile_fx

        number, self._count = self._count, self._count + 1

        def inner_compile(graph: torch.fx.GraphModule, graph_inputs: Any, **kwargs: Any) -> Callable[..., Any]:
            # Lowering changes the graph; its constants are shared.
            runner = torch.fx.GraphModule(graph, copy.deepcopy(graph.graph))
            phase = "inference" if kwargs.get("is_inference") else "forward"
            self._lower(graph, graph_inputs, number, "backward" if kwargs.get("is_backward") else phase, kwargs)
            return self._boxed(runner, len(self._graphs) - 1)

        compile_graph: Any = compile_fx.compile_fx
        place = len(self.passes)
        with pass_log() as notes:
            compiled: Callable[..., Any] = compile_graph(
                gm, inputs, inner_compile=inner_compile, config_patches=self.options
            )
        # What was not done to a lowered graph was done before the graph was split into forward and backward.
        before = [note for note in notes if not any(note is told for told in self._told)]
        self.passes[place:place] = [f"graph {number} (whole): {note}" for note in before]
        return compiled

    def _lower(self, graph: torch.fx.GraphModule, inputs: Any, number: int, phase: str, kwargs: Any) -> None:
        from torch._inductor.compile_fx import compile_fx_inner

        from fvops.graph_report.scheduled import kernels_of, lowered, memory_of

        def look(lowering: Any) -> None:
            # Where all that Dynamo has seen is inside of torch or fvops, a user's line has called that.
            caller = line_of_stack(traceback.extract_stack())
            kernels = [
                replace(kernel, where=caller) if kernel.where and not is_user_s(kernel.where) else kernel
                for kernel in kernels_of(lowering)
            ]
            self._graphs.append(Graph(number, phase, tuple(kernels), *memory_of(lowering)))
            self._runs.append(0)

        with lowered(look), pass_log() as notes:
            compile_fx_inner(graph, inputs, **kwargs)
        self._told += notes
        self.passes += [f"graph {number} ({phase}): {note}" for note in notes]

    def _boxed(self, graph: torch.fx.GraphModule, place: int) -> Callable[..., Any]:
        """`graph` in AOTAutograd's calling convention: one list, which the callee empties."""

        def run(args: Any) -> Any:
            held = list(args)
            args.clear()
            self._runs[place] += 1
            self._running += 1
            try:
                return graph(*held)
            finally:
                self._running -= 1

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def call(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    watcher: Watcher,
    backward: bool,
    dynamic: bool | None,
) -> tuple[list[Break], list[Outside], str]:
    """Run `fn` compiled with `watcher`; graph breaks, calls outside of graphs, why a run on fake tensors ended early.

    Raises:
        ValueError: `backward`, and no output requires a gradient.
    """

    def entry(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    # A code object of its own: Dynamo's entries for it go when it goes, and nobody else's are in its way.
    own = types.FunctionType(entry.__code__.replace(), entry.__globals__, closure=entry.__closure__)
    compiled = torch.compile(own, backend=watcher, dynamic=dynamic)
    with _dynamo_state_kept(), calls_outside_graphs(watcher.is_running) as outside:
        seen = len(graph_break_reasons)
        stopped = ""
        try:
            with torch.enable_grad() if backward else torch.no_grad():
                outputs = compiled(*args, **kwargs)
                if backward:
                    _run_backward(outputs, fn, args, kwargs)
        except DataDependentOutputException as error:
            stopped = f"{error.func} needs the value of a tensor, and there are only fake ones"
        breaks = [
            Break(line_of_stack(reason.user_stack), _reason(reason.reason)) for reason in graph_break_reasons[seen:]
        ]
    # Once for each place: a break in a function that was being inlined is met again when it is compiled by itself.
    return list({found.where: found for found in breaks}.values()), outside, stopped


def _reason(text: str) -> str:
    """Dynamo's reason in one line: what it says, and its explanation, which names what it stopped at."""
    first, *more = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    explained = [line.removeprefix("Explanation: ") for line in more if line.startswith("Explanation: ")]
    return ". ".join([first, *explained])


def _run_backward(outputs: Any, fn: Any, args: Any, kwargs: Any) -> None:
    heads = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    leaves = list({id(tensor): tensor for tensor in tensors_in(fn, args, kwargs) if tensor.requires_grad}.values())
    if not heads or not leaves:
        raise ValueError(
            "fvops.report(backward=True): no output requires a gradient, or no argument and no parameter of a module "
            "does; let one of them require one"
        )
    # Not backward(): that would add to the .grad of the caller's tensors.
    torch.autograd.grad(heads, leaves, [torch.ones_like(head) for head in heads], allow_unused=True)


@contextlib.contextmanager
def _dynamo_state_kept() -> Iterator[None]:
    """Afterwards Dynamo's counters and its list of breaks are as before."""
    before = {name: counter.copy() for name, counter in counters.items()}
    breaks = len(graph_break_reasons)
    try:
        yield
    finally:
        counters.clear()
        counters.update(before)
        del graph_break_reasons[breaks:]


@contextlib.contextmanager
def fakes_in_place_of(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Inside, in a fake mode, a module's parameters and buffers are fake; hands out the arguments as fakes.

    Args:
        device: where what is on the meta device is taken to be.
    """
    modes = {leaf.fake_mode for leaf in tensors_in(fn, args, kwargs) if isinstance(leaf, FakeTensor)}
    if len(modes) > 1:
        raise ValueError("fvops.report: the fake tensors are of several modes; make them all under one")
    mode = modes.pop() if modes else FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in made:
            made[id(tensor)] = _fake(tensor, mode, device)
        return made[id(tensor)]

    with mode, _swapped(modules_in(fn, args, kwargs), fake):
        yield tree_map_only(Tensor, fake, (args, kwargs))


def _fake(tensor: Tensor, mode: FakeTensorMode, device: torch.device) -> Tensor:
    if not tensor.is_meta:
        return mode.from_tensor(tensor)
    with mode:
        twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(twin, requires_grad=tensor.requires_grad)
    return twin.requires_grad_(tensor.requires_grad)


def modules_in(fn: Any, args: Any, kwargs: Any) -> list[nn.Module]:
    """The modules among a function and its arguments."""
    return [leaf for leaf in (fn, *tree_leaves((args, kwargs))) if isinstance(leaf, nn.Module)]


def tensors_in(fn: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors among the arguments, and the parameters and buffers of the modules."""
    own = [tensor for one in modules_in(fn, args, kwargs) for tensor in (*one.parameters(), *one.buffers())]
    return [*own, *(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))]


@contextlib.contextmanager
def _swapped(roots: list[nn.Module], fake: Callable[[Tensor], Tensor]) -> Iterator[None]:
    # Each once: what was swapped already must not be taken for what was there before.
    modules: list[Any] = list(dict.fromkeys(module for root in roots for module in root.modules()))
    places = [(holder, dict(holder)) for module in modules for holder in (module._parameters, module._buffers)]
    try:
        for holder, before in places:
            holder.update({name: fake(tensor) for name, tensor in before.items() if tensor is not None})
        yield
    finally:
        for holder, before in places:
            holder.clear()
            holder.update(before)
