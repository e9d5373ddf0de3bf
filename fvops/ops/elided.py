"""elided: holds the place of an exchange that the compiler has dropped; does nothing.

AOTAutograd counts the chains of ordered calls between the joint graph and its two halves, so a chain may not become
empty in between. The pass over each half takes these calls out.
"""

from __future__ import annotations

from fvops.ops._define import define

__all__ = ["op"]


def nothing(world_size: int, group_name: str) -> None:
    return None


op = define("elided(int world_size, str group_name) -> ()", eager=nothing, fake=nothing)
