"""Looking at collectives: recording them, comparing them between ranks, and saying what a rank waits for.

`docs/debugging.md` says how each works and what it costs.
"""

from __future__ import annotations

from fvops.debug.check import check_collectives
from fvops.debug.records import CollectiveRecord, canonical, record_collectives

__all__ = ["CollectiveRecord", "canonical", "check_collectives", "record_collectives"]
