"""The one-sided exchange: post where results go, push slices straight into the peers' results, raise flags.

`run` is every collective that moves data, given as lists of tensors by place. A rank whose result is not in its pool
posts offset 0, and gets it through the channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fvops.device_communicators.shm.channel import Inlet, Outlet, mismatch, pieces
from fvops.device_communicators.shm.counters import Counters
from fvops.device_communicators.shm.segment_layout import OP, STEP, TABLE_ENTRIES
from fvops.device_communicators.shm.watch import Watch

__all__ = ["Exchange", "Parts"]

_MASK = (1 << 32) - 1

Parts = Mapping[int, Sequence[Tensor]]


class Exchange:
    """Exchanges of one group at one rank; `outlets` and `inlets`, attributes too, are by place."""

    def __init__(
        self, watch: Watch, outlets: Mapping[int, Outlet], inlets: Mapping[int, Inlet], counters: Counters
    ) -> None:
        self._watch = watch
        self._own = watch.segments[watch.me]
        self.outlets = outlets
        self.inlets = inlets
        self._table = self._own.layout.table
        # A flag is a count, so that none is mistaken for an older one.
        self._counters = counters

    def run(
        self,
        op: int,
        give: Parts,
        receive: Parts,
        strides: Sequence[Sequence[int]],
        own: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        """Give ``give[j]`` to each place j in `give`, receive ``receive[i]`` from each place i in `receive`.

        Every place lists as many tensors, at most `most_tensors`.

        Args:
            op: number of the collective.
            give: any strides.
            receive: views of tensors from the pool, or of plain memory.
            strides: of each tensor's parts at the receivers.
            own: (target, source) to copy while others are on their way.
        """
        self.post(op, receive)
        for target, source in own:
            target.copy_(source)
        homeless: dict[int, list[Tensor]] = {}
        for place, parts in give.items():
            segment = self._watch.segments[place]
            for part, part_strides, offset in zip(parts, strides, self.await_post(op, place, parts), strict=True):
                if offset:
                    segment.tensor(offset, part.shape, part_strides, part.dtype).copy_(part)
                else:
                    homeless.setdefault(place, []).append(part)
            self.raise_flag(place)
        self.finish(op, homeless, receive)

    def most_tensors(self) -> int:
        """How many tensors one `run` can take."""
        return TABLE_ENTRIES // self._own.layout.places

    def through_channels(self, op: int, give: Parts, receive: Parts, own: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        """The same movement through the channels alone, in rounds of one piece to and from each peer."""
        gone = [(self.outlets[j], _all_pieces(parts, self.outlets[j].slot_bytes)) for j, parts in give.items()]
        come = [(self.inlets[i], _all_pieces(parts, self.inlets[i].slot_bytes)) for i, parts in receive.items()]
        for outlet, parts in gone:
            if parts:
                outlet.push(op, parts[0])
        for target, source in own:
            target.copy_(source)
        rounds = max([1, *(len(parts) for _, parts in gone), *(len(parts) for _, parts in come)])
        for number in range(rounds):
            for inlet, parts in come:
                if number < len(parts):
                    inlet.pull(op, parts[number])
            for outlet, parts in gone:
                if number + 1 < len(parts):
                    outlet.push(op, parts[number + 1])

    def post(self, op: int, receive: Parts) -> None:
        """Say where each source's parts shall go. Every rank posts in every run, so that the steps stay together."""
        own, quads = self._own, self._own.quads
        for source, parts in receive.items():
            entry = self._table + 2 * source * len(parts)
            for part in parts:
                quads[entry] = own.offset_of(part)
                quads[entry + 1] = part.numel() * part.element_size()
                entry += 2
        own.words[OP] = op
        self._counters.step[0] = step = (self._counters.step[0] + 1) & _MASK
        own.publish(STEP, step)

    def await_post(self, op: int, place: int, parts: Sequence[Tensor]) -> list[int]:
        """Byte offsets in the segment of `place` at which it wants `parts`; 0 for what must go through the channel.

        Raises:
            PeerError: it is in another collective, or expects other sizes.
        """
        segment = self._watch.segments[place]
        self._watch.reach(segment, STEP, self._counters.step[0], place)
        entry = self._table + 2 * self._watch.me * len(parts)
        offsets = []
        for part in parts:
            nbytes = part.numel() * part.element_size()
            offset, expected = segment.quads[entry], segment.quads[entry + 1]
            if (segment.words[OP], expected) != (op, nbytes):
                raise mismatch(place, (segment.words[OP], expected), (op, nbytes))
            offsets.append(offset)
            entry += 2
        return offsets

    def raise_flag(self, place: int) -> None:
        """Tell `place` that all it has posted room for is there."""
        segment = self._watch.segments[place]
        raised = self._counters.raised
        raised[place] = count = (raised[place] + 1) & _MASK
        segment.publish(segment.layout.flag(self._watch.me), count)

    def finish(self, op: int, homeless: Parts, receive: Parts) -> None:
        """Move the rest through the channels, and wait for all flags."""
        own, watch, seen = self._own, self._watch, self._counters.seen
        self.through_channels(op, homeless, {i: self._not_pooled(parts) for i, parts in receive.items()})
        for place in receive:
            seen[place] = count = (seen[place] + 1) & _MASK
            watch.reach(own, own.layout.flag(place), count, place)

    def _not_pooled(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [part for part in parts if part.numel() and not self._own.offset_of(part)]


def _all_pieces(parts: Sequence[Tensor], slot_bytes: int) -> list[Tensor]:
    return [piece for part in parts for piece in pieces(part, slot_bytes)]
