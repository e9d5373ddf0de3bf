"""After a collective has failed, or lasted long: which ranks came to it?

A rank whose transport gives up closes its connections, so the other ranks that were waiting fail within milliseconds
too. Each of them leaves a mark in torch.distributed's store and looks for the others' for a moment. Who leaves none is
missing: dead, stuck, or busy elsewhere. Ranks that have waited long in a call tell one another the same way.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch.distributed as dist

__all__ = ["RollCall"]

# How long the other ranks get to fail as well, in seconds.
_WINDOW_S = 2.0
_POLL_S = 0.02
# What there is when the store cannot be asked, over which the call's own error must not be lost: DistStoreError and
# DistNetworkError are RuntimeErrors; once torch.distributed is destroyed it has no default store, which is a
# ValueError, and while another thread is destroying it a KeyError.
_NO_STORE = (RuntimeError, ValueError, KeyError)


class RollCall:
    """The marks of one group.

    Args:
        name: the group's unique name.
        life: a number that its ranks agreed on, so that marks of an earlier group of that name do not count.
        rank: this rank's place.
    """

    def __init__(self, name: str, life: int, rank: int) -> None:
        self._prefix = f"fvops/failed/{name}/{life}"
        self._rank = rank

    def describe(self, call: str, places: Sequence[int], ranks: Sequence[int]) -> str:
        """Say who of `places` did not come to `call`. Takes at most two seconds.

        Args:
            call: names this one call of the group, alike on all ranks that took part in it.
            ranks: the group's global ranks.
        """
        try:
            absent = self._absent(call, [place for place in places if place != self._rank])
        except _NO_STORE as error:
            return f"who is missing cannot be told, the store is gone, and with it perhaps global rank 0 ({error})"
        if not absent:
            return "every rank of the group came to it, and it failed there too"
        # Over NCCL and HCCL one rank may fail seconds before another that waits for the same dead one.
        return self.names(absent, ranks) + (", of whom some may wait in it still" if len(absent) > 1 else "")

    def waiting(self, call: str, places: Sequence[int], ranks: Sequence[int]) -> str:
        """Say who of `places` does not wait in `call`, as this rank has for long. Takes at most two seconds."""
        try:
            absent = self._absent(f"slow {call}", [place for place in places if place != self._rank])
        except _NO_STORE as error:
            return f"whom it waits for cannot be told, the store is gone ({error})"
        if not absent:
            return "every other rank waits in it too"
        named = ", ".join(f"place {place} (global rank {ranks[place]})" for place in absent)
        return f"not in it, or not for as long: {named}"

    @staticmethod
    def names(absent: Sequence[int], ranks: Sequence[int]) -> str:
        """How missing places are told."""
        return "missing: " + ", ".join(f"place {place} (global rank {ranks[place]})" for place in absent)

    def _absent(self, call: str, places: list[int]) -> list[int]:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"{self._prefix}/{call}/{self._rank}", "")
        until = time.monotonic() + _WINDOW_S
        while True:
            places = [place for place in places if not store.check([f"{self._prefix}/{call}/{place}"])]
            if not places or time.monotonic() > until:
                return places
            time.sleep(_POLL_S)
