"""The faults of a group's message queue: objects without end, until a fault ends them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from tests import fault_programs
from tests.fault_programs import DEADLINE_S
from tests.fault_table import Fault

__all__ = ["form_and_broadcast"]


def form_and_broadcast(fault: Fault, guilty: bool, places: int, store: Any) -> Callable[[], None]:
    """Make the group, let the culprit act, and return what the others do until they are told."""
    from fvops.device_communicators import shm_broadcast

    folder = shm_broadcast.SHARED_FOLDER
    if fault.far and int(os.environ["RANK"]) > 0:
        shm_broadcast.SHARED_FOLDER = "/nowhere"  # as if on another node than the writer
    try:
        fault_programs.form(fault, DEADLINE_S)
    finally:
        shm_broadcast.SHARED_FOLDER = folder
    group = fault_programs.group
    group.broadcast_object("an object")
    if guilty and fault.act == "unread":
        store.wait([f"told/{place}" for place in range(places - 1)], timedelta(seconds=60))
    elif guilty:
        if fault.act == "writer":
            # Others are waiting by then: the second object takes them to the wait for the third.
            group.broadcast_object("an object")
            store.wait([f"waits/{place}" for place in range(1, places)], timedelta(seconds=60))
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        group.broadcast_object("an object")
        store.set(f"waits/{group.rank_in_group}", "")

    def without_end() -> None:
        while True:
            group.broadcast_object("an object")

    return without_end
