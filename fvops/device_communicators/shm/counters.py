"""What this rank has counted with each peer: where Python and `mover.c` go on from each other's exchanges."""

from __future__ import annotations

import ctypes

__all__ = ["Counters"]


class Counters:
    """32-bit counts of one rank of a group, in memory that C reads and writes too; all start at 0 and wrap.

    Attributes:
        step: ``[1]``: exchanges posted.
        raised, seen: by place: flags raised there, and awaited from there.
        sent, taken: by place: pieces pushed into the channel to it, and pulled from the channel from it.
        address: of the first; the others follow in this order.
    """

    def __init__(self, places: int) -> None:
        memory = (ctypes.c_uint32 * (1 + 4 * places))()
        self.address = ctypes.addressof(memory)
        words = memoryview(memory).cast("B").cast("I")
        self.step = words[:1]
        self.raised, self.seen, self.sent, self.taken = (words[1 + i * places :][:places] for i in range(4))
