"""`dump`: what this rank has done last, what it waits for, and the state of its groups. No other rank is asked."""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

from fvops import registry
from fvops._version import __version__
from fvops.debug.journal import Entry, last_calls, running

__all__ = ["dump", "waits_for"]


def dump(file: TextIO | None = None) -> None:
    """Write this rank's groups, calls under way and last calls to `file`, default ``sys.stderr``; from any thread."""
    out = sys.stderr if file is None else file
    out.write("\n".join(_lines()) + "\n")
    out.flush()


def waits_for(entry: Entry) -> str:
    """Whom a call that is under way waits for, as far as the transport tells; empty if it does not."""
    communicator = registry.find(entry.member.group)
    if communicator is None or communicator.member is not entry.member:
        return ""
    if entry.op.endswith(("_object", "_object_list", "_tensor_dict")):
        # Beside the transport, which may wait for somebody in a call of another thread.
        places = [entry.arguments["src"]] if entry.op.startswith("recv") else []
    else:
        places = list(communicator.transport.waiting_for())
    return (
        "waits for "
        + ", ".join(f"place {place} (global rank {entry.member.ranks[place]})" for place in sorted(set(places)))
        if places
        else ""
    )


def _lines() -> list[str]:
    now = time.monotonic()
    lines = [f"fvops {__version__}, pid {os.getpid()}, RANK {os.environ.get('RANK', 'unset')}", "groups:"]
    for name in registry.registered_names():
        communicator = registry.find(name)
        if communicator is not None:
            member = communicator.member
            state = f"broken: {communicator.failure}" if communicator.failure else "ok"
            lines.append(
                f"  {name}: place {member.place} of global ranks {list(member.ranks)}, {communicator.device}, "
                f"{communicator.transport.name}, deadline {member.timeout_s:g} s, {state}"
            )
    lines.append("under way:")
    for entry in running().values():
        waiting = waits_for(entry)
        lines.append(f"  {entry}, for {now - entry.began:.1f} s{waiting and '; ' + waiting}")
    lines.append("last calls, the newest last:")
    for entry in last_calls():
        how = "failed after" if entry.failed else "took"
        lines.append(f"  {now - entry.ended:.1f} s ago {entry}, {how} {(entry.ended - entry.began) * 1e3:.3f} ms")
    return [*lines, "end of dump"]
