"""One-sided collectives between CPU ranks of one node, over shared memory; `docs/one-sided.md` has the protocol."""

from __future__ import annotations

from fvops.device_communicators.shm.shm_transport import ShmTransport

__all__ = ["ShmTransport"]
