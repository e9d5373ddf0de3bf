"""How many bytes a collective sends, and how long a graph's kernels take on a machine whose speeds are stated.

The model is a roofline: a kernel takes the longer of its arithmetic and its memory traffic, a collective its latency
plus its bytes over the bandwidth. Two lanes: kernels run one after another, so do collectives. A collective holds the
kernels up until it is done, unless it is a start whose wait comes later. No contention, no launch overhead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fvops.graph_report.contents import Kernel, Machine

__all__ = ["sent_bytes", "timed"]


def sent_bytes(op: str, nbytes: int, world_size: int) -> int:
    """Bytes that leave a rank which hands `nbytes` to `op`, by the algorithm that sends least.

    A broadcast is counted as on its source, a gather or reduce as on a rank that is not its destination; unequal splits
    of an all_to_all_single as if they were equal.
    """
    P = max(world_size, 1)
    name = op.rsplit(".", 1)[-1].rsplit("::", 1)[-1]
    if P == 1 or name.startswith(("recv", "barrier", "wait")):
        return 0
    if name.startswith("all_reduce"):
        return 2 * nbytes * (P - 1) // P
    if name.startswith("all_gather"):
        return nbytes * (P - 1)
    if name.startswith(("reduce_scatter", "all_to_all")):
        return nbytes * (P - 1) // P
    return nbytes


def timed(kernels: Sequence[Kernel], machine: Machine) -> tuple[Kernel, ...]:
    """`kernels` with their times filled in."""
    compute_us = lane_us = 0.0
    done_us: dict[str, float] = {}
    result: list[Kernel] = []
    under_way: list[int] = []  # places of exchanges that were started
    for kernel in kernels:
        us = _alone_us(kernel, machine)
        if kernel.collective is not None:
            start = max(compute_us, lane_us)
            lane_us = start + us
            done_us[kernel.name] = lane_us
            exposed = 0.0
            if kernel.collective.is_start:
                under_way.append(len(result))
            else:
                # What it stands behind is exposed by it, but is those exchanges' time.
                for place in under_way:
                    behind = result[place].start_us + result[place].us - max(compute_us, result[place].start_us)
                    result[place] = replace(result[place], exposed_us=result[place].exposed_us + max(0.0, behind))
                exposed, compute_us = us, lane_us
                under_way = []
        elif kernel.kind == "wait":
            start = compute_us
            ready = max((done_us[name] for name in kernel.reads if name in done_us), default=compute_us)
            us = exposed = max(0.0, ready - compute_us)
            compute_us += us
        else:
            start, exposed = compute_us, 0.0
            compute_us += us
        result.append(replace(kernel, us=us, start_us=start, exposed_us=exposed))
    return tuple(result)


def _alone_us(kernel: Kernel, machine: Machine) -> float:
    if kernel.collective is not None:
        return machine.latency_us + kernel.collective.sent_bytes / machine.bandwidth_gb_s / 1e3
    return max(kernel.flops / machine.tflops / 1e6, kernel.nbytes / machine.memory_gb_s / 1e3)
