"""Reductions through the channels: each rank sends its terms to who reduces, piece by piece.

Pieces fit in cache, so a term is still there when it is added. Piece k+1 is pushed before piece k is reduced: a peer
that is a little behind keeps nobody waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from fvops.device_communicators.shm.arithmetic import combine
from fvops.device_communicators.shm.channel import Inlet, Outlet, pieces

__all__ = ["Reductions", "shares"]


def shares(numel: int, places: int) -> list[int]:
    """How many elements each place reduces of a large all_reduce."""
    return [numel * (place + 1) // places - numel * place // places for place in range(places)]


class Reductions:
    """Reductions of one group at place `me`; `outlets` and `inlets` are by place, in the order in which to push."""

    def __init__(self, me: int, outlets: Mapping[int, Outlet], inlets: Mapping[int, Inlet], slot_bytes: int) -> None:
        self._me = me
        self._outlets = outlets
        self._inlets = inlets
        self._slot_bytes = slot_bytes

    def run(
        self,
        op: int,
        terms: Mapping[int, Tensor],
        own: Tensor,
        output: Tensor | None,
        reduce_op: str,
        done: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Send ``terms[j]`` to each place j in `terms`; reduce `own` with the peers' terms into `output`, if given.

        Args:
            op: number of the collective.
            own: this rank's term for itself, of the shape of `output`; any strides.
            output: None where this rank does not reduce.
            reduce_op: see `arithmetic.combine`.
            done: called with each piece of `output` in order, once it is reduced and while it is in cache.
        """
        outgoing = [(self._outlets[j], pieces(term, self._slot_bytes)) for j, term in terms.items()]
        mine = [] if output is None else pieces(own, self._slot_bytes)
        results = [] if output is None else pieces(output, self._slot_bytes)
        rounds = max([len(mine), *(len(parts) for _, parts in outgoing)])
        for number in range(rounds + 1):
            for outlet, parts in outgoing:
                if number < len(parts):
                    outlet.push(op, parts[number])
            if 0 < number <= len(mine):
                self._reduce(op, mine[number - 1], results[number - 1], reduce_op)
                if done is not None:
                    done(results[number - 1])

    def _reduce(self, op: int, own: Tensor, result: Tensor, reduce_op: str) -> None:
        terms: Sequence[Tensor] = [
            own if place == self._me else self._inlets[place].peek(op, own) for place in range(len(self._inlets) + 1)
        ]
        combine(result, terms, reduce_op)
        for inlet in self._inlets.values():
            inlet.release()
