"""`GroupCoordinator`: one process group with its collectives, traceable by Dynamo.

The data methods read only `world_size`, `rank_in_group`, `unique_name` and `device`, which are constants to a compiled
function and guards on it: a group re-created under the same name with the same values needs no new compilation.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fvops import checks, envs, ops, registry
from fvops.agreement import agree_on_max, fresh_number
from fvops.debug import check as debug_check
from fvops.debug import patience
from fvops.device_communicators.base_device_communicator import DeviceCommunicatorBase
from fvops.device_communicators.choice import build_communicator
from fvops.device_communicators.shm_broadcast import MessageQueue
from fvops.formation import process_groups, settling
from fvops.graph_capture import capture_on_side_stream
from fvops.group_objects import GroupObjects
from fvops.logger import init_logger
from fvops.platforms import local_torch_device
from fvops.reduce_op import reduce_op_name
from fvops.warmup import warm_up

__all__ = ["GroupCoordinator", "destroy_all_groups"]

logger = init_logger(__name__)

# Bytes and number of the message queue's chunks: control messages fit into one, larger objects take several.
_QUEUE_SIZES = (256 << 10, 8)
# Every group of this process that was not destroyed, for `destroy_all_groups`.
_live: list[GroupCoordinator] = []


def destroy_all_groups() -> None:
    """Destroy every group of this process, whoever made it: what must happen before torch.distributed stops."""
    for group in list(_live):
        group.destroy()


class GroupCoordinator(GroupObjects):
    """The group, out of `group_ranks`, that this process is in. Collective: every rank of the world makes it alike.

    Args:
        group_ranks: global ranks of each group; every rank of the world is in exactly one.
        local_rank: this process's place on its node; picks the device.
        torch_distributed_backend: backend of the device group, e.g. "gloo" or "nccl".
        use_device_communicator: build a device communicator (for more than one rank).
        use_message_queue_broadcaster: build a `MessageQueue` (for more than one rank), over which place 0 broadcasts
            objects.
        group_name: what `unique_name` starts with; default "anonymous".
        device: where the group's tensors live; default CPU for gloo, else this rank's accelerator.
        timeout_s: deadline of each wait for the group's other ranks, seconds; default ``FVOPS_TIMEOUT_S``. The same
            on every rank.

    Raises:
        ValueError: a rank is in none of `group_ranks`, or in several, or out of the world. On every rank.
        RuntimeError: a rank did not come in time, torch.distributed's store does not answer, or the transport that
            ``FVOPS_TRANSPORT`` asks for cannot be used on every rank.
    """

    def __init__(
        self,
        group_ranks: list[list[int]],
        local_rank: int,
        torch_distributed_backend: str,
        use_device_communicator: bool,
        use_message_queue_broadcaster: bool = False,
        group_name: str | None = None,
        device: torch.device | None = None,
        *,
        timeout_s: float | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError("torch.distributed is not initialized; call init_distributed_environment first")
        rank = dist.get_rank()
        _check_group_ranks(group_ranks, group_name)
        self.timeout_s = envs.deadline(timeout_s)
        device_group: Any = None
        cpu_group: Any = None
        # new_group is collective over the world: every rank makes every group, in the same order.
        for ranks in group_ranks:
            made = process_groups(ranks, torch_distributed_backend, group_name or "anonymous", self.timeout_s)
            if rank in ranks:
                device_group, cpu_group = made
        owned_groups = [device_group, cpu_group]
        self._setup(local_rank, device_group, cpu_group, use_device_communicator, group_name, device, owned_groups)
        if use_message_queue_broadcaster and self.world_size > 1:
            self.mq_broadcaster = MessageQueue.create_from_process_group(cpu_group, *_QUEUE_SIZES)

    def _setup(
        self,
        local_rank: int,
        device_group: dist.ProcessGroup,
        cpu_group: dist.ProcessGroup,
        use_device_communicator: bool,
        group_name: str | None,
        device: torch.device | None,
        owned_groups: list[dist.ProcessGroup],
    ) -> None:
        self.rank = dist.get_rank()
        self.local_rank = local_rank
        self.device_group = device_group
        self.cpu_group = cpu_group
        self.ranks: list[int] = dist.get_process_group_ranks(cpu_group)
        self.world_size = len(self.ranks)
        self.rank_in_group = self.ranks.index(self.rank)
        if device is None:
            gloo = dist.get_backend(device_group) == "gloo"
            device = torch.device("cpu") if gloo else local_torch_device(local_rank)
        self.device = device
        self.use_device_communicator = use_device_communicator
        self.use_custom_op_call = True
        self.unique_name = registry.agree_on_name(group_name or "anonymous", partial(agree_on_max, cpu_group=cpu_group))
        self._owned_groups = owned_groups
        communicator = build_communicator(cpu_group, self.device, device_group, self.unique_name, self.timeout_s)
        # The name may have belonged to another group before; its failures are not this one's.
        communicator.live(fresh_number(cpu_group))
        self._communicator: DeviceCommunicatorBase | None = communicator
        # The ops always have one to run on; the attribute is None where upstream's is.
        self.device_communicator: DeviceCommunicatorBase | None = (
            communicator if use_device_communicator and self.world_size > 1 else None
        )
        registry.register(self.unique_name, communicator)
        debug_check.follow_variable()
        _live.append(self)
        if self.world_size > 1:
            patience.start()
        logger.info(
            "group %r: ranks %s, %s, transport %s",
            self.unique_name,
            self.ranks,
            self.device,
            communicator.transport.name,
        )

    @classmethod
    def from_process_group(
        cls, pg: dist.ProcessGroup, group_name: str | None = None, *, timeout_s: float | None = None
    ) -> GroupCoordinator:
        """A coordinator over an existing process group (collective over it). `destroy` leaves `pg` alone.

        Args:
            timeout_s: as for the class; what goes over `pg` has the deadline that `pg` was made with.

        Raises:
            TypeError: `pg` is not a ProcessGroup of which this process is a member.
        """
        if not isinstance(pg, dist.ProcessGroup):
            raise TypeError(f"pg must be a ProcessGroup that this rank is in, got {type(pg).__name__}")
        deadline = envs.deadline(timeout_s)
        cpu_group, owned_groups = pg, []
        if dist.get_backend(pg) != "gloo":
            with settling("a gloo group beside it", pg):
                cpu_group = dist.new_group(
                    dist.get_process_group_ranks(pg),
                    backend="gloo",
                    timeout=timedelta(seconds=deadline),
                    use_local_synchronization=True,
                )
            owned_groups = [cpu_group]
        self = cls.__new__(cls)
        self.timeout_s = deadline
        self._setup(envs.LOCAL_RANK, pg, cpu_group, True, group_name, None, owned_groups)
        return self

    @classmethod
    def from_device_mesh(
        cls, mesh: Any, mesh_dim: int | str, group_name: str | None = None, *, timeout_s: float | None = None
    ) -> GroupCoordinator:
        """A coordinator over one dim of a ``torch.distributed.DeviceMesh``; its process group stays the mesh's."""
        name = mesh_dim if isinstance(mesh_dim, str) and group_name is None else group_name
        return cls.from_process_group(mesh.get_group(mesh_dim), name, timeout_s=timeout_s)

    @property
    def first_rank(self) -> int:
        """Global rank of the group's first place."""
        return self.ranks[0]

    @property
    def last_rank(self) -> int:
        """Global rank of the group's last place."""
        return self.ranks[-1]

    @property
    def is_first_rank(self) -> bool:
        return self.rank == self.first_rank

    @property
    def is_last_rank(self) -> bool:
        return self.rank == self.last_rank

    @property
    def next_rank(self) -> int:
        """Global rank of the next place; the last one's next is the first."""
        return self.ranks[(self.rank_in_group + 1) % self.world_size]

    @property
    def prev_rank(self) -> int:
        """Global rank of the previous place; the first one's previous is the last."""
        return self.ranks[(self.rank_in_group - 1) % self.world_size]

    # --- tensors. A group of one rank returns the input, checked like any; an op itself never returns its input.

    def all_reduce(self, input_: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """The reduction of the ranks' tensors, as a new tensor. Differentiable for SUM and AVG.

        Args:
            op: ReduceOp.SUM, AVG, MAX, MIN or PRODUCT; None means SUM.
        """
        return ops.all_reduce(self, input_, reduce_op_name(op))

    def all_gather(self, input_: Tensor, dim: int = -1) -> Tensor:
        """The ranks' tensors concatenated along `dim`: ``[..., n, ...] -> [..., P*n, ...]``. Differentiable."""
        return ops.all_gather(self, input_, dim)

    def reduce_scatter(self, input_: Tensor, op: Any = dist.ReduceOp.SUM, dim: int = -1) -> Tensor:
        """This rank's slice of the reduction: ``[..., N, ...] -> [..., N/P, ...]``. Differentiable for SUM and AVG.

        Raises:
            ValueError: `dim` is not divisible by P.
        """
        return ops.reduce_scatter(self, input_, reduce_op_name(op), dim)

    def all_to_all_4D(self, input_: Tensor, scatter_dim: int = 2, gather_dim: int = 1) -> Tensor:
        """The Ulysses exchange. (2, 1): ``[B, S/P, H, D] -> [B, S, H/P, D]``; (1, 2): the inverse. Differentiable.

        Raises:
            ValueError: not a 4D tensor, another pair of dims, or the scattered dim is not divisible by P.
        """
        return ops.all_to_all_4D(self, input_, scatter_dim, gather_dim)

    def all_to_all_4D_coalesced(
        self, inputs: Sequence[Tensor], scatter_dim: int = 2, gather_dim: int = 1
    ) -> list[Tensor]:
        """`all_to_all_4D` of several tensors (q, k, v), in one grouped exchange. Shapes and dtypes may differ.

        Differentiable: the gradients of all inputs travel in one grouped exchange too.

        Raises:
            ValueError: the list is empty, or an input is one that `all_to_all_4D` refuses.
        """
        return ops.all_to_all_4D_coalesced(self, inputs, scatter_dim, gather_dim)

    def all_to_all_single(
        self,
        input_: Tensor,
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
    ) -> Tensor:
        """Part j of dim 0 goes to place j; the received parts are concatenated. An addition of ours. Differentiable.

        Args:
            output_split_sizes: rows received from each place; None: equal parts.
            input_split_sizes: rows sent to each place; both are given or neither.
        """
        return ops.all_to_all_single(self, input_, output_split_sizes, input_split_sizes)

    def gather(self, input_: Tensor, dst: int = 0, dim: int = -1) -> Tensor | None:
        """The ranks' tensors concatenated along `dim` on place `dst`, None elsewhere. No gradient: refused."""
        return ops.gather(self, input_, dst, dim)

    def broadcast(self, input_: Tensor, src: int = 0) -> Tensor:
        """Fill `input_`, in place, with the tensor of place `src`, and return it. No gradient: refused.

        ``torch.ops.fvops.broadcast`` is the differentiable, out-of-place form.
        """
        checks.check_place("broadcast", self.unique_name, "src", src, self.world_size)
        checks.check_no_grad("broadcast", self.unique_name, input_, "in place it has no gradient")
        checks.check_strided("broadcast", self.unique_name, input_)
        checks.check_writable("broadcast", self.unique_name, input_)
        received = ops.broadcast(self, input_, src)
        if self.rank_in_group != src:
            input_.copy_(received)
        return input_

    def shard(self, input_: Tensor, dim: int = -1, *, scale_grad: bool) -> Tensor:
        """This rank's slice of `dim`: ``[..., N, ...] -> [..., N/P, ...]``.

        Args:
            scale_grad: divide the gradient, which is all-gathered, by P.

        Raises:
            ValueError: `dim` is not divisible by P.
        """
        return ops.shard(self, input_, dim, scale_grad)

    def send(self, tensor: Tensor, dst: int | None = None) -> None:
        """Send `tensor` to place `dst` (default: the next). May return before the receiver has posted. No gradient."""
        self._need_partner("send")
        ops.send(self, tensor, (self.rank_in_group + 1) % self.world_size if dst is None else dst)

    def recv(self, size: Sequence[int], dtype: torch.dtype, src: int | None = None) -> Tensor:
        """A new tensor of `size` and `dtype` from place `src` (default: the previous)."""
        self._need_partner("recv")
        return ops.recv(self, size, dtype, (self.rank_in_group - 1) % self.world_size if src is None else src)

    def barrier(self) -> None:
        """Return once every rank has called this. Over the CPU group: not capturable in a CUDA graph."""
        ops.barrier(self)

    def graph_capture(self, graph_capture_context: Any | None = None) -> AbstractContextManager[Any]:
        """A context whose stream is the current one inside, for ``torch.cuda.graph(g, stream=context.stream)``.

        Elsewhere than on CUDA there is nothing to capture: it hands back the context given. See docs/cuda-graphs.md.
        """
        return capture_on_side_stream(self.device, graph_capture_context)

    def warmup(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> None:
        """Do, on every rank, whatever must not happen under capture or in the first step. Collective.

        Args:
            shapes: shapes ``[B, S/P, H, D]`` that `all_to_all_4D` will be handed in mode (2, 1).
            dtype: their dtype.

        Raises:
            ValueError: a shape that `all_to_all_4D` refuses.
        """
        # Alone too: FVOPS_TRANSPORT may have given a group of one rank a library.
        warm_up(registry.resolve(self.unique_name, self.world_size), shapes, dtype)

    def destroy(self) -> None:
        """Give up the group: calls under its name raise from now on. Safe to call twice.

        Waits for sends that are still open, at most until the deadline, unless the group is broken. Not collective,
        but the name is free for re-use only once every rank has destroyed the group.
        """
        if self._communicator is None:
            return
        registry.unregister(self.unique_name)
        debug_check.leave(self._communicator.member)
        self._close_objects()
        self._communicator.destroy()
        self._communicator = self.device_communicator = None
        for group in self._owned_groups:
            # After destroy_process_group() of the world there is nothing left to destroy.
            if dist.is_initialized():
                dist.destroy_process_group(group)
        self._owned_groups = []
        # Gloo closes its sockets with the last reference, and a program may keep this object.
        self.device_group = self.cpu_group = None  # type: ignore[assignment]
        _live.remove(self)
        if not _live:
            patience.stop()

    def _need_partner(self, op: str) -> None:
        if self.world_size == 1:
            checks.fail(RuntimeError, f"{checks.where(op, self.unique_name)}: a group of one rank has no partner")


def _check_group_ranks(group_ranks: list[list[int]], group_name: str | None) -> None:
    world_size = dist.get_world_size()
    everyone = [member for ranks in group_ranks for member in ranks]
    outside = sorted({member for member in everyone if not 0 <= member < world_size})
    if outside:
        raise ValueError(
            f"group_ranks of group {group_name!r} name ranks {outside}; the world is 0 to {world_size - 1}"
        )
    twice = sorted({member for member in everyone if everyone.count(member) > 1})
    if twice:
        raise ValueError(f"group_ranks of group {group_name!r} name ranks {twice} more than once: {group_ranks}")
    left_out = sorted(set(range(world_size)) - set(everyone))
    if left_out:
        raise ValueError(f"group_ranks of group {group_name!r} leave out ranks {left_out}: {group_ranks}")
