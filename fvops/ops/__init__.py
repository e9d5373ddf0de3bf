"""Every collective as ``torch.ops.fvops.<name>``; one file an op: schema, checks, eager code, fake, gradient.

The functions here are what `GroupCoordinator` calls: the op, with the group's name, world size and rank filled in. In
eager the op checks its arguments; where it cannot (see `checked_in_python`), the same checks run here. A group of one
rank gets its input back.
"""

from fvops.ops.all_gather import all_gather
from fvops.ops.all_reduce import all_reduce
from fvops.ops.all_to_all_4D import all_to_all_4D
from fvops.ops.all_to_all_4D_coalesced import all_to_all_4D_coalesced
from fvops.ops.all_to_all_4D_packed import op as _packed_op  # noqa: F401  (made by the compiler's layout pass)
from fvops.ops.all_to_all_4D_start import start_op as _start_op  # noqa: F401  (made by the overlap pass)
from fvops.ops.all_to_all_single import all_to_all_single
from fvops.ops.barrier import barrier
from fvops.ops.broadcast import broadcast
from fvops.ops.elided import op as _elided_op  # noqa: F401  (made by the compiler's cancel pass)
from fvops.ops.gather import gather
from fvops.ops.point_to_point import recv, send
from fvops.ops.reduce import op as _reduce_op  # noqa: F401  (defined for broadcast's gradient; no coordinator method)
from fvops.ops.reduce_scatter import reduce_scatter
from fvops.ops.shard import shard
from fvops.ops.sum_of_products import op as _sum_of_products_op  # noqa: F401  (made by the compiler's absorb pass)

__all__ = [
    "all_gather",
    "all_reduce",
    "all_to_all_4D",
    "all_to_all_4D_coalesced",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "gather",
    "recv",
    "reduce_scatter",
    "send",
    "shard",
]
