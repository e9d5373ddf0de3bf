"""Fixtures of both test folders, and what `make test` leaves to `make test-slow` so as to stay under ten minutes."""

from __future__ import annotations

import pytest

from tests.fixtures import ranks, two_ranks

__all__ = ["ranks", "two_ranks"]

# At three ranks only: the op suite and test_transports.py run all ops at 2, 3 and 4 over the same code, and what is not
# about ops hardly depends on their number.
_AT_THREE = {
    "test_shm_collectives",
    "test_shm_mover",
    "test_pynccl_double",
    "test_pyhccl_double",
    "test_message_queue",
    "test_tensor_dicts",
    "test_stateless_group",
    "test_objects",
    "test_lifecycle",
    "test_groups",
    "test_debug_check",
}
# What another parameter covers already: training compiles forward too, aot_eager traces as eager does, the compiled
# diffusers model is the demo's; or what takes longest: training under DDP and FSDP2.
_COVERED = {
    "test_eight_sequence_lengths[2-inductor-default-inference]",
    "test_eight_sequence_lengths[2-inductor-dynamic-inference]",
    "test_refusals[2-False-dynamic]",
    "test_refusals[2-True-dynamic]",
    "test_inductor_compiles_all_of_them_in_one_graph[2-inference]",
    "test_worlds_and_ranks_share_a_cache_folder[inference]",
    "test_every_method_helper_and_getter_traces_whole[eager-2-inference]",
    "test_every_method_helper_and_getter_traces_whole[eager-2-training]",
    "test_every_method_helper_and_getter_traces_whole[aot_eager-2-inference]",
    "test_random_programs_issue_the_same_collectives[4-2-inference]",
    "test_two_ranks_share_a_sequence[ddp]",
    "test_two_ranks_share_a_sequence[fsdp2]",
    "test_data_movement_is_bitwise[aot_eager]",
    "test_compiled_functions_outlive_their_groups[2-aot_eager]",
    "test_exchanges_are_pushed_and_the_rest_is_not[P3]",
    "test_output_is_that_of_one_rank[2-True]",
    "test_output_is_that_of_one_rank[3-False]",
    "test_a_compiled_program_in_which_one_rank_skips_a_layer[4]",
    "test_exchanges_are_pushed_and_the_rest_is_not[P4]",
    "test_three_times_over_env_with_one_port[P3]",
    "test_three_times_over_env_with_one_port[P4]",
    "test_group_names_are_reused_after_reinitialisation[P3]",
    "test_a_backward_in_which_one_rank_takes_another_way[P4]",
    "test_layout_kernels[relu]",
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
