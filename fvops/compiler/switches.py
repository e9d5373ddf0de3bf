"""Which passes are on: set by `enable` and `disable`, written into the compile caches' keys, read back from there.

Every pass reads the switches out of the configuration entry that is hashed into the caches' keys
(`fvops.compiler.cache`), so that a switch cannot take effect without being part of the key of what it made.
"""

from __future__ import annotations

import dataclasses
import sys
from types import TracebackType
from typing import Any

__all__ = ["MERGE_BYTES", "OVERLAP_BYTES", "Enabled", "Switches", "chosen", "disable", "enable", "options"]

# What `merge=True` stands for: q, k and v of every model that we know of (547 MB a rank is the largest) stay together.
MERGE_BYTES = 1 << 30

# What `overlap=True` stands for: two exchanges of q, k and v of a 14B model at 480p are under way together.
OVERLAP_BYTES = 1 << 30

_LAYOUTS = ("auto", "fused", "exchange")


@dataclasses.dataclass(frozen=True)
class Switches:
    """The passes and their settings; the defaults leave the sequence of collectives as eager has it.

    Attributes:
        layout: where the layout of a 4D exchange is computed: "fused", as aten operations around an exchange of packed
            buffers, which Inductor fuses with what stands next to them; "exchange", by the transport; "auto" is
            "exchange" on CPU, whose transport writes strided slices straight into the peers' results, else "fused".
        merge: largest input, in bytes, that exchanges may be merged into; 0: no merging.
        cancel: drop exchanges that are undone by their inverse.
        overlap: how many bytes exchanges under way, and what is computed ahead of its turn meanwhile, may hold; 0:
            every exchange is waited for where it is issued.
        dead: drop exchanges whose result nobody reads.
        absorb: matrix products read received parts and write packed buffers, where exchanges are opened up.
    """

    layout: str = "auto"
    merge: int = 0
    cancel: bool = False
    overlap: int = 0
    dead: bool = False
    absorb: bool = False

    @property
    def text(self) -> str:
        """As written into the caches' keys; `parse` reads it."""
        return ",".join(f"{name}={int(value) if name != 'layout' else value}" for name, value in vars(self).items())

    @classmethod
    def parse(cls, text: str) -> Switches:
        """The switches that `text` stands for."""
        values = dict(item.split("=") for item in text.split(","))
        flags = {name: bool(int(values[name])) for name in ("cancel", "dead", "absorb")}
        return cls(values["layout"], merge=int(values["merge"]), overlap=int(values["overlap"]), **flags)


_DEFAULT = Switches()
# But for `dead`, which is for those who ask for it by name.
_ALL = Switches(merge=MERGE_BYTES, cancel=True, overlap=OVERLAP_BYTES, absorb=True)
_chosen = _DEFAULT


def chosen() -> Switches:
    """What `enable` and `disable` have set for this process."""
    return _chosen


class Enabled:
    """What `enable` returns: as a context manager it puts back, at its end, what was set before."""

    def __init__(self, before: Switches) -> None:
        self._before = before

    def __enter__(self) -> None:
        """Nothing: `enable` has set the switches already."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _choose(self._before)


def enable(
    *,
    layout: str | None = None,
    merge: bool | int | None = None,
    cancel: bool | None = None,
    overlap: bool | int | None = None,
    dead: bool | None = None,
    absorb: bool | None = None,
) -> Enabled:
    """Switch passes on for what this process compiles from now on, or inside a ``with`` block.

    Without arguments all of them but `dead`; with arguments those that are named, the others stay as they are. A
    function that is compiled already stays as it was compiled. Call it alike on every rank: `merge`, `cancel` and
    `dead` change the sequence of collectives, and every rank must run the same one. See docs/compiler.md for what
    each pass promises.

    Args:
        layout: "auto", "fused" or "exchange" (`Switches.layout`).
        merge: True for exchanges of up to `MERGE_BYTES`, or a limit in bytes; False or 0 switches merging off.
        cancel: drop exchanges that are undone by their inverse.
        overlap: True for `OVERLAP_BYTES`, or a number of bytes (`Switches.overlap`); False or 0 switches it off.
        dead: drop exchanges whose result nobody reads.
        absorb: let matrix products read received parts and write packed buffers; it sums in another order.

    Raises:
        ValueError: `layout` is none of the three, or `merge` or `overlap` is negative.
        TypeError: `merge` or `overlap` is neither bool nor int, or `cancel`, `dead` or `absorb` not a bool.
    """
    before = _chosen
    _choose(_with(before, layout=layout, merge=merge, cancel=cancel, overlap=overlap, dead=dead, absorb=absorb))
    return Enabled(before)


def disable() -> None:
    """Put every switch back to its default: `layout` on "auto", everything else off."""
    _choose(_DEFAULT)


def options(
    *,
    layout: str | None = None,
    merge: bool | int | None = None,
    cancel: bool | None = None,
    overlap: bool | int | None = None,
    dead: bool | None = None,
    absorb: bool | None = None,
) -> dict[str, Any]:
    """The same switches for one function: ``torch.compile(f, options=fvops.compiler.options())``.

    Arguments and errors as for `enable`; what is not named is as this process has it. Other options may be added to the
    returned dict.
    """
    from fvops.compiler import cache

    return cache.pinned(
        _with(_chosen, layout=layout, merge=merge, cancel=cancel, overlap=overlap, dead=dead, absorb=absorb)
    )


def _with(base: Switches, **named: Any) -> Switches:
    """`base` with the switches that are not None set as they say; with none of them, everything on."""
    changes = {name: value for name, value in named.items() if value is not None}
    if not changes:
        return dataclasses.replace(_ALL, layout=base.layout, dead=base.dead)
    for name, value in changes.items():
        if name == "layout":
            if value not in _LAYOUTS:
                raise ValueError(f"layout={value!r}: must be one of {', '.join(map(repr, _LAYOUTS))}")
        elif name in _LIMITS:
            changes[name] = _limit(name, value)
        elif not isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: must be a bool")
    return dataclasses.replace(base, **changes)


# What True stands for, of the switches that are a number of bytes.
_LIMITS = {"merge": MERGE_BYTES, "overlap": OVERLAP_BYTES}


def _limit(name: str, value: Any) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: must be a bool or a number of bytes")
    if value < 0:
        raise ValueError(f"{name}={value}: the limit in bytes cannot be negative")
    return _LIMITS[name] if value is True else int(value)


def _choose(switches: Switches) -> None:
    global _chosen
    _chosen = switches
    # A program that compiles nothing does not import Inductor's configuration: `install` writes the entry.
    if "torch._inductor.config" in sys.modules:
        from fvops.compiler import cache

        cache.salt_caches()
