"""Names that differ between the torch versions we run on (2.11 to 2.13); each line says when it can go."""

from __future__ import annotations

import torch.distributed as dist

__all__ = ["all_gather_flat", "reduce_scatter_flat"]

# torch 2.13 renames these two and warns at every call of the old names. Remove once torch >= 2.13 is required.
all_gather_flat = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
