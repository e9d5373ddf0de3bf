"""The candidates of `tools/bench_collectives.py`: the same collective, done by fvops and by what others use.

Each takes this rank's input and gives this rank's result. "upstream" is the sequence of copies that FastVideo's
`AllToAll4D` makes around its exchange, written by us from a description of its layouts; with ``FASTVIDEO_DIR`` pointing
to an unpacked ``fastvideo`` wheel the real class runs beside it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

from fvops.group_coordinator import GroupCoordinator
from fvops.kernels.layout import heads_by_rank
from fvops.torch_compat import all_gather_flat, reduce_scatter_flat

__all__ = ["FLOOR", "STRIDED_FLOOR", "candidates"]

Call = Callable[[], Any]
FLOOR = "plain copy"
# What an exchange in one pass cannot beat: the copies that it makes, without other ranks.
STRIDED_FLOOR = "its copies alone"
# As Wan2.1 1.3B; with ranks that 12 does not divide by, as Wan2.1 14B.
HEADS, MORE_HEADS, HEAD_SIZE = 12, 40, 128


def candidates(fvops: GroupCoordinator, gloo: GroupCoordinator, nbytes: int, dtype: torch.dtype) -> dict[str, Any]:
    """By collective, the calls to compare on tensors of about `nbytes` bytes.

    Args:
        fvops: a group on fvops' own choice of transport.
        gloo: a group of the same ranks on its gloo process group.
    """
    P = fvops.world_size
    heads = MORE_HEADS if HEADS % P else HEADS
    row = heads * HEAD_SIZE * dtype.itemsize
    rows = max(1, round(nbytes / row / P)) * P
    q, k, v = (torch.randn(1, rows, heads, HEAD_SIZE).to(dtype) for _ in range(3))
    flat, target = q.view(rows, -1), torch.empty_like(q)
    parts = heads_by_rank(q, P)
    parts_target = torch.empty(parts.shape, dtype=dtype)
    qkv, qkv_target = torch.cat([q, k, v]), torch.cat([q, k, v])
    pg = gloo.cpu_group
    exchanges: dict[str, Call] = {
        "fvops": lambda: fvops.all_to_all_4D(q),
        "fvops over gloo": lambda: gloo.all_to_all_4D(q),
        "upstream's copies": lambda: upstream_exchange(q, P, pg),
        **_real_upstream(q, P, pg),
        **_diffusers(q, pg),
        "torch.distributed": lambda: packed_exchange(q, P, lambda x: _dist_all_to_all(x, pg)),
        "funcol": lambda: packed_exchange(q, P, lambda x: _funcol_all_to_all(x, pg)),
        STRIDED_FLOOR: lambda: parts_target.copy_(parts),
        FLOOR: lambda: target.copy_(q),
    }
    together: dict[str, Call] = {
        "fvops": lambda: fvops.all_to_all_4D_coalesced([q, k, v]),
        "fvops, one by one": lambda: [fvops.all_to_all_4D(x) for x in (q, k, v)],
        "fvops over gloo": lambda: gloo.all_to_all_4D_coalesced([q, k, v]),
        "upstream's copies": lambda: upstream_exchange(torch.cat([q, k, v]), P, pg).chunk(3),
        FLOOR: lambda: qkv_target.copy_(qkv),
    }
    return {
        "all_to_all_4D": exchanges,
        "q, k, v": together,
        "all_reduce": {
            "fvops": lambda: fvops.all_reduce(flat),
            "fvops over gloo": lambda: gloo.all_reduce(flat),
            "torch.distributed": lambda: _dist_all_reduce(flat, pg),
            "funcol": lambda: funcol.wait_tensor(funcol.all_reduce(flat, "sum", pg)),
        },
        "all_gather": {
            "fvops": lambda: fvops.all_gather(flat, 0),
            "fvops over gloo": lambda: gloo.all_gather(flat, 0),
            "torch.distributed": lambda: _dist_all_gather(flat, P, pg),
        },
        "reduce_scatter": {
            "fvops": lambda: fvops.reduce_scatter(flat, dim=0),
            "fvops over gloo": lambda: gloo.reduce_scatter(flat, dim=0),
            "torch.distributed": lambda: _dist_reduce_scatter(flat, P, pg),
        },
    }


def upstream_exchange(x_BSHD: Tensor, P: int, pg: Any) -> Tensor:
    """Mode (2, 1) by way of a heads-first buffer: a copy before the exchange, two after it."""
    heads_first = x_BSHD.transpose(0, 2).contiguous()  # [H, S/P, B, D]: rank r's heads are one run
    received = torch.empty_like(heads_first)
    dist.all_to_all_single(received, heads_first, group=pg)
    whole_sequence = torch.cat(received.chunk(P), dim=1)  # [H/P, S, B, D]
    return whole_sequence.transpose(0, 2).contiguous()


def packed_exchange(x_BSHD: Tensor, P: int, all_to_all: Callable[[Tensor], Tensor]) -> Tensor:
    """Mode (2, 1) as one would write it today: one copy before the exchange, one after it."""
    B, s, H, D = x_BSHD.shape
    send = x_BSHD.view(B, s, P, H // P, D).permute(2, 0, 1, 3, 4).contiguous()
    return all_to_all(send).transpose(0, 1).reshape(B, P * s, H // P, D)


def _dist_all_to_all(send: Tensor, pg: Any) -> Tensor:
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=pg)
    return received


def _funcol_all_to_all(send: Tensor, pg: Any) -> Tensor:
    return funcol.wait_tensor(funcol.all_to_all_single(send, None, None, pg))


def _dist_all_reduce(x: Tensor, pg: Any) -> Tensor:
    total = x.clone()
    dist.all_reduce(total, group=pg)
    return total


def _dist_all_gather(x: Tensor, P: int, pg: Any) -> Tensor:
    gathered = x.new_empty((x.size(0) * P, *x.shape[1:]))
    all_gather_flat(gathered, x, group=pg)
    return gathered


def _dist_reduce_scatter(x: Tensor, P: int, pg: Any) -> Tensor:
    own = x.new_empty((x.size(0) // P, *x.shape[1:]))
    reduce_scatter_flat(own, x, group=pg)
    return own


def _real_upstream(x: Tensor, P: int, pg: Any) -> dict[str, Call]:
    folder = os.environ.get("FASTVIDEO_DIR")
    if not folder:
        return {}
    # The file alone: the package around it wants a GPU stack.
    path = Path(folder) / "fastvideo/distributed/device_communicators/base_device_communicator.py"
    spec = importlib.util.spec_from_file_location("fastvideo_communicator", path)
    if spec is None or spec.loader is None or not path.exists():
        raise SystemExit(f"FASTVIDEO_DIR={folder}: there is no {path}; unpack a fastvideo wheel there")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = module.DistributedAutograd.AllToAll4D
    return {"FastVideo": lambda: function.apply(pg, x, P, 2, 1)}


def _diffusers(x: Tensor, pg: Any) -> dict[str, Call]:
    if importlib.util.find_spec("diffusers") is None:
        return {}
    from diffusers.models.attention_dispatch import _all_to_all_dim_exchange

    return {"diffusers": lambda: _all_to_all_dim_exchange(x, 2, 1, pg)}
