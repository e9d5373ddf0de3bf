"""Fixtures of both test folders, and what `make test` leaves to `make test-slow` so as to stay under ten minutes."""

from __future__ import annotations

import pytest

from tests.fixtures import ranks, two_ranks

__all__ = ["ranks", "two_ranks"]

# At three ranks only: the op suite and test_transports.py run all ops at 2, 3 and 4 over the same code.
_AT_THREE = {
    "test_shm_collectives",
    "test_pynccl_double",
    "test_pyhccl_double",
    "test_message_queue",
    "test_tensor_dicts",
    "test_stateless_group",
}
# What another parameter covers already: training compiles forward too, dynamic shapes take the static path first.
_COVERED = {
    "test_eight_sequence_lengths[2-inductor-default-inference]",
    "test_eight_sequence_lengths[2-inductor-dynamic-inference]",
    "test_refusals[2-False-static]",
    "test_inductor_compiles_all_of_them_in_one_graph[2-inference]",
    "test_worlds_and_ranks_share_a_cache_folder[inference]",
}
# GPU tests whose bodies can run on CPU ranks: there to see that they run at all.
_ON_CPU = {"cpu", "double"}


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        module = item.path.stem
        call = getattr(item, "callspec", None)
        if call is None:
            continue
        if item.name in _COVERED:
            item.add_marker(pytest.mark.slow)
        if module in _AT_THREE and call.params.get("ranks", 3) != 3:
            item.add_marker(pytest.mark.slow)
        if module.startswith("test_gpu_") and _ON_CPU & set(call.id.split("-")):
            item.add_marker(pytest.mark.slow)
