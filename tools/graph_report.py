"""What torch.compile makes of a program on P ranks, told on one process without any.

    python tools/graph_report.py --model wan-1.3b --ranks 4 [--backward] [--html out.html] [--json out.json]
    python tools/graph_report.py my_model:Block --input 1x4096x1536:bfloat16 --ranks 4 --passes all
    python tools/graph_report.py my_model.py:step --inputs my_model.py:arguments --ranks 8 --passes merge,layout=fused

The first reports one block of a known model; a step has its collectives once a block. The others report a function or
an nn.Module of yours (a class of modules is built without arguments), which gets its group from `fvops.get_sp_group()`.
Its arguments are tensors without memory, of the shapes given, or what a function of yours returns. Your code runs with
the meta device as torch's default and on groups of ranks that do not exist, so no memory is used and nothing is sent.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # started as a file: what stands beside tools/ is not on the path then
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import fvops
from fvops.graph_report import Machine, Report, planned_groups
from fvops.graph_report.models import MODELS
from fvops.graph_report.plan import report_of_block
from tools.user_program import callable_of, inputs_of, passes_of

__all__ = ["main"]


def main() -> int:
    parser = _parser()
    args = parser.parse_args()
    if (args.program is None) == (args.model is None):
        parser.error("give either a program or --model")
    if args.model and (args.input or args.inputs):
        parser.error("--input and --inputs are of a program of your own; a --model has its own")
    if args.input and args.inputs:
        parser.error("--input and --inputs exclude each other")
    if args.ranks < 1:
        parser.error("--ranks must be at least 1")
    with contextlib.ExitStack() as switched:
        try:
            for call in passes_of(args.passes):
                switched.enter_context(fvops.compiler.enable(**call))
            machine = Machine(args.bandwidth_gb_s, args.latency_us, args.tflops, args.memory_gb_s)
        except ValueError as error:
            parser.error(str(error))
        return _model(args, machine) if args.model else _program(parser, args, machine)


def _model(args: argparse.Namespace, machine: Machine) -> int:
    model = MODELS[args.model]
    try:
        report = report_of_block(model, args.ranks, backward=args.backward, machine=machine)
    except ValueError as error:
        print(f"{model.title} on {args.ranks} ranks is refused: {error}", file=sys.stderr)
        return 1
    return _show(f"{model.title} on {args.ranks} ranks, one of {model.blocks} blocks, bfloat16", report, args)


def _program(parser: argparse.ArgumentParser, args: argparse.Namespace, machine: Machine) -> int:
    with planned_groups(sp_size=args.ranks):
        try:
            with torch.device("meta"):
                function, inputs = callable_of(args.program), inputs_of(args.input, args.inputs, args.backward)
        except ValueError as error:
            parser.error(str(error))
        try:
            report = fvops.report(function, *inputs, backward=args.backward, machine=machine)
        except ValueError as error:
            print(f"{args.program} on {args.ranks} ranks is refused: {error}", file=sys.stderr)
            return 1
    return _show(f"{args.program} on {args.ranks} ranks", report, args)


def _show(title: str, report: Report, args: argparse.Namespace) -> int:
    # The pages are looked at when the command line is forgotten.
    title += ", forward and backward" if args.backward else ""
    report = replace(report, name=f"{title}, passes: {args.passes or 'the defaults'}")
    print(report.text())
    for path in filter(None, (args.html, args.json, args.txt)):
        report.save(path)
    return 0


def _parser() -> argparse.ArgumentParser:
    defaults = Machine()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", nargs="?", help="module:function or file.py:function, of your own")
    parser.add_argument("--model", choices=sorted(MODELS))
    parser.add_argument("--ranks", type=int, required=True, help="size of the sequence-parallel group")
    parser.add_argument("--input", action="append", default=[], metavar="SIZES[:DTYPE]", help="a tensor, in order")
    parser.add_argument("--inputs", metavar="MODULE:FUNCTION", help="a function that returns the arguments")
    parser.add_argument("--passes", default="", help="all, or some: merge,cancel,overlap,absorb,dead,layout=fused")
    parser.add_argument("--backward", action="store_true", help="report a training step")
    for name, what in (
        ("bandwidth_gb_s", "what a rank sends, GB/s"),
        ("latency_us", "of a collective, us"),
        ("tflops", "of matrix products, TFLOP/s"),
        ("memory_gb_s", "memory, GB/s"),
    ):
        default = getattr(defaults, name)
        parser.add_argument("--" + name.replace("_", "-"), type=float, default=default, help=f"{what} ({default:g})")
    for form in ("html", "json", "txt"):
        parser.add_argument(f"--{form}", metavar="FILE", help=f"also save the report, as .{form}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
