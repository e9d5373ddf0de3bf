"""Looking at collectives: recording them, comparing them between ranks, and saying what a rank waits for.

`docs/debugging.md` says how each works and what it costs.
"""

from __future__ import annotations

from fvops.debug.check import check_collectives
from fvops.debug.records import CollectiveRecord, canonical, record_collectives
from fvops.debug.report import dump
from fvops.debug.signals import install_signal_handler

__all__ = [
    "CollectiveRecord",
    "canonical",
    "check_collectives",
    "dump",
    "install_signal_handler",
    "record_collectives",
]
