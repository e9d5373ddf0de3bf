"""Failures, for both communicators: each ends in an error with op, group and cause on every rank, never in a hang.

Every job has a deadline far below what a hang would take; nothing is asserted about times.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import pytest

from tests.doubles import faults
from tests.doubles.build import build
from tests.harness import Ranks

__all__ = ["FaultSuite"]

LATE = "did not return within its deadline"
# scene: world size, culprit, the failing op, what the culprit is told, what the others are told ("" for nothing)
_CALLS = {
    "error": (3, 1, "all_reduce", "injected into", LATE),
    "hang": (2, 0, "all_reduce", LATE, LATE),
    "absent": (4, 2, "all_reduce", "", LATE),
    "unreceived": (2, 0, "send", LATE, ""),
    "unanswered group": (2, 1, "group_end", LATE, ""),
    "error in a group": (2, 1, "", "injected into", ""),
    "async": (3, 2, "all_reduce", "injected asynchronous error", ""),
    "two threads": (2, 0, "broadcast", "", LATE),
}


class FaultSuite:
    """A test for each scene."""

    which: ClassVar[str]

    @property
    def path(self) -> str:
        """The double."""
        return build(f"{self.which}_double")

    def stories(self, scene: str, world_size: int, culprit: int) -> list[dict[str, Any]]:
        """Each rank's."""
        return Ranks.get(world_size).run(faults.in_call, self.which, self.path, scene, culprit, deadline_s=60)

    @pytest.mark.parametrize("scene", list(_CALLS))
    def test_a_call_that_cannot_be_done_ends_in_an_error_that_says_why(self, scene: str) -> None:
        world_size, culprit, op, guilty, others = _CALLS[scene]
        for rank, story in enumerate(self.stories(scene, world_size, culprit)):
            check_story(self.which, story, op, guilty if story["guilty"] else others, rank)

    @pytest.mark.parametrize(("scene", "world_size"), [("late rank", 3), ("failed init", 2), ("no id", 3)])
    def test_a_start_that_fails_says_why_on_every_rank(self, scene: str, world_size: int) -> None:
        culprit = 0 if scene == "no id" else 1
        results = Ranks.get(world_size).run(faults.in_life, self.which, self.path, scene, culprit, deadline_s=60)
        for rank, (text, _) in enumerate(results):
            assert text.startswith("RuntimeError: "), (rank, text)
            assert f"py{self.which}" in text, (rank, text)
            assert " on group '" in text, (rank, text)
            if scene == "no id":
                assert "rank 0 has no unique id" in text, (rank, text)
                assert "injected into" in text, (rank, text)
            elif scene == "failed init" and rank == culprit:
                assert "injected into" in text, text
            else:
                assert "not all ranks came within 1 s" in text, (rank, text)

    def test_destroy_ends_whatever_the_library_does(self) -> None:
        for scene, words in (("endless destroy", "was not done within 0.5 s"), ("failed destroy", "injected into")):
            results = Ranks.get(2).run(faults.in_life, self.which, self.path, scene, 1, deadline_s=60)
            (fine, handle), (text, left) = results
            assert (fine, handle, left) == ("None", None, None), (scene, results)
            assert words in text, (scene, text)
            assert " on group '" in text, (scene, text)

    def test_where_one_rank_has_no_library_all_are_disabled(self) -> None:
        results = Ranks.get(3).run(faults.in_life, self.which, self.path, "one without library", 1, deadline_s=60)
        for text, flags in results:
            assert flags == (False, True)
            assert text.startswith("RuntimeError"), text
            assert "rank 1: cannot load /no/such/library.so" in text, text


def check_story(which: str, story: dict[str, Any], op: str, words: str, rank: int) -> None:
    """Fail unless the rank was told `words`, or nothing when they are empty, and drew the consequences."""
    if not words:
        assert story["text"] == "", (rank, story)
        assert not story["broken"], (rank, story)
        assert "no group is open" in story["group_left"], (rank, story)
    else:
        assert story["text"].startswith(f"BrokenCommunicatorError: fvops.py{which}.{op}"), (rank, story)
        assert " on group '" in story["text"], (rank, story)
        assert words in story["text"], (rank, story)
        assert re.search(r"call \d+, deadline 1.5 s: ", story["text"]) or "asynchronous" in words, (rank, story)
        assert story["broken"], (rank, story)
        assert words in story["reason"], (rank, story)
        # Every later call says so too, under its own name.
        assert f"fvops.py{which}.broadcast on group" in story["later"], (rank, story)
        assert story["reason"] in story["later"], (rank, story)
        assert story["reason"] in story["group_left"], (rank, story)
    assert "it was destroyed" in story["destroyed"], (rank, story)
