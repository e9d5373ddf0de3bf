"""Fixtures for all tests that run over several ranks; the root conftest.py offers them to both test folders."""

from __future__ import annotations

import pytest

from tests.harness import Ranks


@pytest.fixture(params=[2, 3, 4], ids="P{}".format)
def ranks(request: pytest.FixtureRequest) -> Ranks:
    """The workers of 2, 3 and 4 ranks, in turn."""
    return Ranks.get(request.param)


@pytest.fixture
def two_ranks() -> Ranks:
    """Two workers, for what does not depend on how many there are."""
    return Ranks.get(2)
