"""The one-sided exchange: post where results go, push slices straight into the peers' results, raise flags.

`run` is every collective that moves data, given as lists of tensors by place. A rank whose result is not in its pool
posts offset 0, and gets it through the channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fvops.device_communicators.shm.channel import Inlet, Outlet, mismatch, pieces
from fvops.device_communicators.shm.segment_layout import OP, STEP, TABLE_ENTRIES
from fvops.device_communicators.shm.watch import Watch

__all__ = ["Exchange", "Parts"]

_MASK = (1 << 32) - 1

Parts = Mapping[int, Sequence[Tensor]]


class Exchange:
    """Exchanges of one group at one rank; `outlets` and `inlets` are by place."""

    def __init__(self, watch: Watch, outlets: Mapping[int, Outlet], inlets: Mapping[int, Inlet]) -> None:
        self._watch = watch
        self._own = watch.segments[watch.me]
        self._outlets = outlets
        self._inlets = inlets
        self._table = self._own.layout.table
        self._step = 0
        # How many flags went to and came from each place: a flag is a count, so that none is mistaken for an older one.
        self._raised = dict.fromkeys(outlets, 0)
        self._seen = dict.fromkeys(inlets, 0)

    def run(self, op: int, give: Parts, receive: Parts, strides: Sequence[Sequence[int]]) -> None:
        """Give ``give[j]`` to each place j in `give`, receive ``receive[i]`` from each place i in `receive`.

        Every place lists as many tensors, at most `most_tensors`, and no part is empty unless all of a tensor's are.

        Args:
            op: number of the collective.
            give: any strides.
            receive: views of tensors from the pool, or of plain memory.
            strides: of each tensor's parts at the receivers.
        """
        self._post(op, receive)
        through = self._push(op, give, strides)
        self.through_channels(op, through, {i: self._not_pooled(parts) for i, parts in receive.items()})
        self._await_flags(receive)

    def most_tensors(self) -> int:
        """How many tensors one `run` can take."""
        return TABLE_ENTRIES // self._own.layout.places

    def through_channels(self, op: int, give: Parts, receive: Parts) -> None:
        """The same movement through the channels alone, in rounds of one piece to and from each peer."""
        gone = [(self._outlets[j], _all_pieces(parts, self._outlets[j].slot_bytes)) for j, parts in give.items()]
        come = [(self._inlets[i], _all_pieces(parts, self._inlets[i].slot_bytes)) for i, parts in receive.items()]
        rounds = max((len(parts) for _, parts in (*gone, *come)), default=0)
        for number in range(rounds):
            for outlet, parts in gone:
                if number < len(parts):
                    outlet.push(op, parts[number])
            for inlet, parts in come:
                if number < len(parts):
                    inlet.pull(op, parts[number])

    def _post(self, op: int, receive: Parts) -> None:
        """Say where each source's parts shall go. Every rank posts in every run, so that the steps stay together."""
        own, quads = self._own, self._own.quads
        for source, parts in receive.items():
            entry = self._table + 2 * source * len(parts)
            for part in parts:
                quads[entry] = own.offset_of(part)
                quads[entry + 1] = part.numel() * part.element_size()
                entry += 2
        own.words[OP] = op
        self._step = (self._step + 1) & _MASK
        own.publish(STEP, self._step)

    def _push(self, op: int, give: Parts, strides: Sequence[Sequence[int]]) -> dict[int, list[Tensor]]:
        """Push what has a place at its receiver, raise the flags, and return what has none, by receiver."""
        watch, rest = self._watch, {}
        for place, parts in give.items():
            segment = watch.segments[place]
            watch.reach(segment, STEP, self._step, place)
            entry = segment.layout.table + 2 * watch.me * len(parts)
            homeless = []
            for part, part_strides in zip(parts, strides, strict=True):
                nbytes = part.numel() * part.element_size()
                offset, expected = segment.quads[entry], segment.quads[entry + 1]
                if (segment.words[OP], expected) != (op, nbytes):
                    raise mismatch(place, (segment.words[OP], expected), (op, nbytes))
                if offset:
                    segment.tensor(offset, part.shape, part_strides, part.dtype).copy_(part)
                else:
                    homeless.append(part)
                entry += 2
            self._raised[place] = count = (self._raised[place] + 1) & _MASK
            segment.publish(segment.layout.flag(watch.me), count)
            if homeless:
                rest[place] = homeless
        return rest

    def _await_flags(self, receive: Parts) -> None:
        own, watch = self._own, self._watch
        for place in receive:
            self._seen[place] = count = (self._seen[place] + 1) & _MASK
            watch.reach(own, own.layout.flag(place), count, place)

    def _not_pooled(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [part for part in parts if part.numel() and not self._own.offset_of(part)]


def _all_pieces(parts: Sequence[Tensor], slot_bytes: int) -> list[Tensor]:
    return [piece for part in parts for piece in pieces(part, slot_bytes)]
