"""The process groups of this program: world, node, tensor-, sequence- and data-parallel, and who sets them up.

The getters read module globals, which Dynamo guards by the attributes a compiled function uses: after destroy and
re-initialisation with the same topology, compiled functions go on without a new compilation.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from fvops import envs
from fvops.agreement import check_same_ops
from fvops.checks import fail
from fvops.group_builders import (
    another_group,
    consecutive_ranks,
    data_parallel_ranks,
    group_in_world,
    init_model_parallel_group,
    init_world_group,
    node_ranks,
)
from fvops.group_coordinator import GroupCoordinator, destroy_all_groups
from fvops.logger import init_logger
from fvops.node import get_same_node_ranks, is_the_same_node_as
from fvops.platforms import default_backend, local_torch_device
from fvops.rendezvous import start_torch_distributed

__all__ = [
    "GroupCoordinator",
    "cleanup_dist_env_and_memory",
    "destroy_distributed_environment",
    "destroy_model_parallel",
    "ensure_model_parallel_initialized",
    "get_dp_group",
    "get_dp_rank",
    "get_dp_world_size",
    "get_local_torch_device",
    "get_node_group",
    "get_same_node_ranks",
    "get_sp_group",
    "get_sp_parallel_rank",
    "get_sp_world_size",
    "get_tp_group",
    "get_tp_rank",
    "get_tp_world_size",
    "get_world_group",
    "get_world_rank",
    "get_world_size",
    "init_distributed_environment",
    "init_model_parallel_group",
    "init_world_group",
    "initialize_model_parallel",
    "initialize_sequence_parallel_group",
    "initialize_tensor_parallel_group",
    "is_the_same_node_as",
    "maybe_init_distributed_environment_and_model_parallel",
    "model_parallel_is_initialized",
    "patch_sequence_parallel_group",
    "patch_tensor_parallel_group",
]

logger = init_logger(__name__)

_WORLD: GroupCoordinator | None = None
_NODE: GroupCoordinator | None = None
_TP: GroupCoordinator | None = None
_SP: GroupCoordinator | None = None
_DP: GroupCoordinator | None = None
# Did we start torch.distributed? Only then do we stop it.
_STARTED_TORCH_DISTRIBUTED = False
# While a patch is in force: the group that it hides.
_TP_BEFORE_PATCH: GroupCoordinator | None = None
_SP_BEFORE_PATCH: GroupCoordinator | None = None


def get_world_group() -> GroupCoordinator:
    """All ranks. RuntimeError before `init_distributed_environment`."""
    if _WORLD is None:
        fail(RuntimeError, "the world group is not initialized; call init_distributed_environment first")
    return _WORLD


def get_node_group() -> GroupCoordinator:
    """The ranks that share this node. RuntimeError before `init_distributed_environment`."""
    if _NODE is None:
        fail(RuntimeError, "the node group is not initialized; call init_distributed_environment first")
    return _NODE


def get_tp_group() -> GroupCoordinator:
    """The current tensor-parallel group. RuntimeError before `initialize_model_parallel`."""
    if _TP is None:
        fail(RuntimeError, "the tensor-parallel group is not initialized; call initialize_model_parallel first")
    return _TP


def get_sp_group() -> GroupCoordinator:
    """The current sequence-parallel group. RuntimeError before `initialize_model_parallel`."""
    if _SP is None:
        fail(RuntimeError, "the sequence-parallel group is not initialized; call initialize_model_parallel first")
    return _SP


def get_dp_group() -> GroupCoordinator:
    """The data-parallel group. RuntimeError before `initialize_model_parallel`."""
    if _DP is None:
        fail(RuntimeError, "the data-parallel group is not initialized; call initialize_model_parallel first")
    return _DP


def get_world_size() -> int:
    """Number of ranks in the world."""
    return get_world_group().world_size


def get_world_rank() -> int:
    """This rank's place in the world."""
    return get_world_group().rank_in_group


def get_tp_world_size() -> int:
    """Number of ranks in the tensor-parallel group."""
    return get_tp_group().world_size


def get_tp_rank() -> int:
    """This rank's place in the tensor-parallel group."""
    return get_tp_group().rank_in_group


def get_sp_world_size() -> int:
    """Number of ranks in the sequence-parallel group."""
    return get_sp_group().world_size


def get_sp_parallel_rank() -> int:
    """This rank's place in the sequence-parallel group."""
    return get_sp_group().rank_in_group


def get_dp_world_size() -> int:
    """Number of ranks in the data-parallel group."""
    return get_dp_group().world_size


def get_dp_rank() -> int:
    """This rank's place in the data-parallel group."""
    return get_dp_group().rank_in_group


def get_local_torch_device() -> torch.device:
    """``cuda:LOCAL_RANK``, ``npu:LOCAL_RANK``, else ``cpu``."""
    return local_torch_device(envs.LOCAL_RANK)


def init_distributed_environment(
    world_size: int = 1,
    rank: int = 0,
    distributed_init_method: str = "env://",
    local_rank: int = 0,
    backend: str | None = None,
    device_id: torch.device | None = None,
) -> None:
    """Start torch.distributed if it is not started, then build the world and node groups. Collective.

    Args:
        backend: None picks nccl on CUDA, hccl on NPU, gloo on CPU.
        device_id: handed to ``init_process_group``; the groups' device.

    Raises:
        ValueError: `rank` is not in ``range(world_size)``.
        RuntimeError: already initialized with another world size or rank, or the ranks run different fvops; or the
            ranks do not meet within ``FVOPS_TIMEOUT_S``.
    """
    global _WORLD, _NODE, _STARTED_TORCH_DISTRIBUTED
    if _WORLD is not None:
        if (_WORLD.world_size, _WORLD.rank) != (world_size, rank):
            raise RuntimeError(
                f"the world is initialized already, as rank {_WORLD.rank} of {_WORLD.world_size}; "
                f"asked for rank {rank} of {world_size}. Call destroy_distributed_environment first"
            )
        return
    backend = default_backend() if backend is None else backend
    if not dist.is_initialized():
        start_torch_distributed(backend, distributed_init_method, world_size, rank, device_id)
        _STARTED_TORCH_DISTRIBUTED = True
    elif (dist.get_world_size(), dist.get_rank()) != (world_size, rank):
        raise RuntimeError(
            f"torch.distributed runs as rank {dist.get_rank()} of {dist.get_world_size()}; "
            f"asked for rank {rank} of {world_size}"
        )
    everyone = list(range(world_size))
    world = init_world_group(everyone, local_rank, backend, device_id)
    try:
        check_same_ops(world.cpu_group)
        nodes = node_ranks(world.cpu_group, world_size)
        node = init_model_parallel_group(nodes, local_rank, backend, group_name="node", device=world.device)
    except BaseException:  # even interrupted, no half-made state may stay
        world.destroy()
        raise
    _WORLD, _NODE = world, node


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1,
    sequence_model_parallel_size: int = 1,
    data_parallel_size: int = 1,
    backend: str | None = None,
    *,
    timeout_s: float | None = None,
) -> None:
    """Build the TP and SP groups, of consecutive ranks, and the DP groups ``range(i, world, sp)``. Collective.

    Args:
        data_parallel_size: 1 derives it as world / sp; another value must equal that.
        timeout_s: deadline of each wait in these groups, seconds; default ``FVOPS_TIMEOUT_S``.

    Raises:
        ValueError: a size does not divide the world, or the data-parallel size does not fit.
        RuntimeError: already initialized, or no world yet.
    """
    global _TP, _SP, _DP
    world = get_world_group()
    if _TP is not None or _SP is not None or _DP is not None:
        raise RuntimeError("model-parallel groups are initialized already; call destroy_model_parallel first")
    tp_ranks = consecutive_ranks(world.world_size, tensor_model_parallel_size, "tensor_model_parallel_size")
    sp_ranks = consecutive_ranks(world.world_size, sequence_model_parallel_size, "sequence_model_parallel_size")
    dp_ranks = data_parallel_ranks(world.world_size, sequence_model_parallel_size, data_parallel_size)
    _TP = group_in_world(world, tp_ranks, "tp", backend, timeout_s)
    _SP = group_in_world(world, sp_ranks, "sp", backend, timeout_s)
    _DP = group_in_world(world, dp_ranks, "dp", backend, timeout_s)


def ensure_model_parallel_initialized(tp_size: int, sp_size: int, dp_size: int = 1, backend: str | None = None) -> None:
    """`initialize_model_parallel` if needed, else check that the sizes agree (RuntimeError)."""
    if not model_parallel_is_initialized():
        initialize_model_parallel(tp_size, sp_size, dp_size, backend)
        return
    asked = {"tensor": tp_size, "sequence": sp_size}
    have = {"tensor": get_tp_world_size(), "sequence": get_sp_world_size()}
    if dp_size != 1:
        asked["data"], have["data"] = dp_size, get_dp_world_size()
    if asked != have:
        raise RuntimeError(f"model-parallel groups are initialized with sizes {have}; asked for {asked}")


def maybe_init_distributed_environment_and_model_parallel(
    tp_size: int, sp_size: int, distributed_init_method: str = "env://"
) -> None:
    """Both initialisers, from ``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE``; sets the current CUDA or NPU device.

    A no-op when already done with the same sizes.

    Raises:
        RuntimeError: already done with others.
    """
    if _WORLD is not None and model_parallel_is_initialized():
        ensure_model_parallel_initialized(tp_size, sp_size)
        return
    device = get_local_torch_device()
    if device.type != "cpu":
        getattr(torch, device.type).set_device(device)
    init_distributed_environment(
        world_size=envs.WORLD_SIZE,
        rank=envs.RANK,
        distributed_init_method=distributed_init_method,
        local_rank=envs.LOCAL_RANK,
        # No device_id: torch would make its own NCCL communicator at once, half a gigabyte that nothing needs where
        # fvops has one. The groups' device follows from the local rank.
    )
    ensure_model_parallel_initialized(tp_size, sp_size)


def model_parallel_is_initialized() -> bool:
    """Do the TP, SP and DP groups all exist?"""
    return _TP is not None and _SP is not None and _DP is not None


def initialize_tensor_parallel_group(
    tensor_model_parallel_size: int = 1,
    backend: str | None = None,
    group_name_suffix: str = "",
    *,
    timeout_s: float | None = None,
) -> GroupCoordinator:
    """One more TP group, for a second model with another degree; named ``tp_{suffix}``. Collective over the world.

    Args:
        timeout_s: deadline of each wait in it, seconds; default ``FVOPS_TIMEOUT_S``.

    Raises:
        ValueError: the size does not divide the world.
    """
    return another_group(get_world_group(), "tp", tensor_model_parallel_size, backend, group_name_suffix, timeout_s)


def initialize_sequence_parallel_group(
    sequence_model_parallel_size: int = 1,
    backend: str | None = None,
    group_name_suffix: str = "",
    *,
    timeout_s: float | None = None,
) -> GroupCoordinator:
    """One more SP group, for a second model with another degree; named ``sp_{suffix}``. Collective over the world.

    Args:
        timeout_s: deadline of each wait in it, seconds; default ``FVOPS_TIMEOUT_S``.

    Raises:
        ValueError: the size does not divide the world.
    """
    return another_group(get_world_group(), "sp", sequence_model_parallel_size, backend, group_name_suffix, timeout_s)


@contextlib.contextmanager
def patch_tensor_parallel_group(tp_group: GroupCoordinator) -> Iterator[None]:
    """Inside, `tp_group` is the current TP group. Nesting raises RuntimeError."""
    global _TP, _TP_BEFORE_PATCH
    if _TP_BEFORE_PATCH is not None:
        fail(RuntimeError, "the tensor-parallel group is patched already; patches do not nest")
    _TP_BEFORE_PATCH, _TP = get_tp_group(), tp_group
    try:
        yield
    finally:
        # After a clean-up inside the block there is nothing to go back to.
        if _TP_BEFORE_PATCH is not None:
            _TP, _TP_BEFORE_PATCH = _TP_BEFORE_PATCH, None


@contextlib.contextmanager
def patch_sequence_parallel_group(sp_group: GroupCoordinator) -> Iterator[None]:
    """Inside, `sp_group` is the current SP group. Nesting raises RuntimeError."""
    global _SP, _SP_BEFORE_PATCH
    if _SP_BEFORE_PATCH is not None:
        fail(RuntimeError, "the sequence-parallel group is patched already; patches do not nest")
    _SP_BEFORE_PATCH, _SP = get_sp_group(), sp_group
    try:
        yield
    finally:
        # After a clean-up inside the block there is nothing to go back to.
        if _SP_BEFORE_PATCH is not None:
            _SP, _SP_BEFORE_PATCH = _SP_BEFORE_PATCH, None


def destroy_model_parallel() -> None:
    """Destroy the TP, SP and DP groups, those that exist, and end patches; a group that was patched in goes as well."""
    global _TP, _SP, _DP, _TP_BEFORE_PATCH, _SP_BEFORE_PATCH
    for group in (_TP, _SP, _DP, _TP_BEFORE_PATCH, _SP_BEFORE_PATCH):
        if group is not None:
            group.destroy()
    _TP = _SP = _DP = _TP_BEFORE_PATCH = _SP_BEFORE_PATCH = None


def destroy_distributed_environment() -> None:
    """Destroy the world and node groups, and stop torch.distributed if fvops started it. Safe in any state.

    Stopping it ends every process group, so every other group of fvops is destroyed first.
    """
    global _WORLD, _NODE, _STARTED_TORCH_DISTRIBUTED
    for group in (_NODE, _WORLD):
        if group is not None:
            group.destroy()
    _WORLD = _NODE = None
    if _STARTED_TORCH_DISTRIBUTED and dist.is_initialized():
        destroy_model_parallel()
        destroy_all_groups()
        dist.destroy_process_group()
    _STARTED_TORCH_DISTRIBUTED = False


def cleanup_dist_env_and_memory(shutdown_ray: bool = False) -> None:
    """Destroy every group of this module, stop torch.distributed if fvops started it, and free cached device memory.

    Args:
        shutdown_ray: also shut Ray down (it must be installed).
    """
    destroy_model_parallel()
    destroy_distributed_environment()
    if shutdown_ray:
        import ray

        ray.shutdown()
    gc.collect()
    device = get_local_torch_device()
    if device.type != "cpu":
        _accelerator: Any = getattr(torch, device.type)
        _accelerator.empty_cache()
