"""Fixtures of both test folders."""

from tests.fixtures import ranks, two_ranks

__all__ = ["ranks", "two_ranks"]
