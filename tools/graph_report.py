"""What torch.compile makes of a model's block on P ranks, told on one process without any.

    python tools/graph_report.py --model wan-1.3b --ranks 4 [--backward] [--html out.html] [--json out.json]

Prints the report of one block, and saves it where asked. The collectives are those of one block; a step has them once a
block. For a function or module of your own call `fvops.report`.
"""

from __future__ import annotations

import argparse
import sys

from fvops.graph_report import Machine
from fvops.graph_report.models import MODELS
from fvops.graph_report.plan import report_of_block

__all__ = ["main"]


def main() -> int:
    defaults = Machine()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, choices=sorted(MODELS))
    parser.add_argument("--ranks", type=int, required=True, help="size of the sequence-parallel group")
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
    args = parser.parse_args()
    if args.ranks < 1:
        parser.error("--ranks must be at least 1")
    machine = Machine(args.bandwidth_gb_s, args.latency_us, args.tflops, args.memory_gb_s)
    model = MODELS[args.model]
    try:
        report = report_of_block(model, args.ranks, backward=args.backward, machine=machine)
    except ValueError as error:
        print(f"{model.title} on {args.ranks} ranks is refused: {error}", file=sys.stderr)
        return 1
    print(f"{model.title} on {args.ranks} ranks, one of {model.blocks} blocks, bfloat16")
    print(report.text())
    for path in filter(None, (args.html, args.json, args.txt)):
        report.save(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
