"""A group's collectives on real tensors: check, record, cut into rank-major parts, hand to the transport.

`DeviceCommunicatorBase` works on any device that torch.distributed has a backend for. A subclass overrides what its
device can do better; the ops and the groups never look below this interface.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fvops import checks, envs
from fvops.debug import check as debug_check
from fvops.debug import journal
from fvops.debug.calls import Call, Member, observe, observers
from fvops.device_communicators import exchanges_4D
from fvops.device_communicators.asynchronous import AtOnce, Later, Started, Worker
from fvops.device_communicators.flat_transport import RefusedError
from fvops.device_communicators.process_group_transport import ProcessGroupTransport
from fvops.device_communicators.roll_call import RollCall
from fvops.device_communicators.solo_transport import SoloTransport
from fvops.kernels import layout
from fvops.logger import init_logger
from fvops.reduce_op import reduce_op_name

__all__ = ["DeviceCommunicatorBase", "DistributedAutograd"]

logger = init_logger(__name__)

_STRIDED = torch.strided


class DeviceCommunicatorBase:
    """Collectives over one process group. Every method returns new contiguous tensors and leaves its inputs untouched.

    Called with a tensor that requires a gradient, the methods that have one go through `DistributedAutograd`, the
    others refuse; the ops call them below autograd.

    Args:
        cpu_group: process group for control messages (gloo).
        device: where the tensors live; default CPU.
        device_group: process group for tensors; default `cpu_group`.
        unique_name: the group's name, for messages and records.
        timeout_s: deadline of each wait for the group's other ranks, seconds; default ``FVOPS_TIMEOUT_S``.

    Attributes:
        why_transport: why `transport` is what it is, in words.
        failure: the first error that left the ranks in different states; empty while there was none. Afterwards every
            call is refused with it.
    """

    def __init__(
        self,
        cpu_group: dist.ProcessGroup,
        device: torch.device | str | None = None,
        device_group: dist.ProcessGroup | None = None,
        unique_name: str = "",
        *,
        timeout_s: float | None = None,
    ) -> None:
        self.timeout_s = envs.FVOPS_TIMEOUT_S if timeout_s is None else timeout_s
        self.failure = ""
        self.device = torch.device("cpu") if device is None else torch.device(device)
        self.cpu_group = cpu_group
        self.device_group = cpu_group if device_group is None else device_group
        self.unique_name = unique_name
        self.ranks: list[int] = dist.get_process_group_ranks(cpu_group)
        self.world_size = len(self.ranks)
        self.rank = self.rank_in_group = dist.get_rank(cpu_group)
        self.global_rank = dist.get_rank()
        self.global_world_size = dist.get_world_size()
        self.why_transport = "torch's process group serves this device" if self.world_size > 1 else "one rank"
        self.transport = self._make_transport()
        self._issued: dict[str, int] = {}
        self._later: Later | None = None
        self.live(0)

    def live(self, number: int) -> None:
        """Begin a life: `number`, on which the ranks agreed, tells this group from earlier ones of its name."""
        self.member = Member(self.unique_name, number, self.rank, tuple(self.ranks), self.timeout_s)
        self.roll_call = RollCall(self.unique_name, number, self.rank)

    def all_reduce(self, input_: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """The reduction of the ranks' tensors; `op` is a ReduceOp or its name (see `reduce_op_name`)."""
        op = reduce_op_name(op)
        if _needs_grad(input_):
            return DistributedAutograd.AllReduce.apply(self, input_, op)
        self.check("all_reduce", input_)
        checks.check_reduce_op("all_reduce", self.unique_name, op, input_.dtype)
        output = self.transport.like(input_)
        self._issue("all_reduce", input_, {"op": op}, self.transport.all_reduce, output, input_, op)
        return output

    def reduce(self, input_: Tensor, dst: int, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """The reduction on `dst`, zeros of the same shape elsewhere."""
        op = reduce_op_name(op)
        self.check("reduce", input_, differentiable=False)
        checks.check_reduce_op("reduce", self.unique_name, op, input_.dtype)
        checks.check_place("reduce", self.unique_name, "dst", dst, self.world_size)
        output = self.transport.like(input_)
        self._issue("reduce", input_, {"op": op, "dst": dst}, self.transport.reduce, output, input_, op, dst)
        return output if self.rank == dst else output.zero_()

    def all_gather(self, input_: Tensor, dim: int = -1) -> Tensor:
        """The ranks' tensors concatenated along `dim`."""
        if _needs_grad(input_):
            return DistributedAutograd.AllGather.apply(self, input_, self.world_size, dim)
        self.check("all_gather", input_)
        dim = checks.check_concat("all_gather", self.unique_name, input_, dim)
        output = self._room_for_all(input_, dim)
        self._issue("all_gather", input_, {"dim": dim}, self.transport.all_gather_along, output, input_, dim)
        return output

    def reduce_scatter(self, input_: Tensor, op: Any = dist.ReduceOp.SUM, dim: int = -1) -> Tensor:
        """This rank's slice, along `dim`, of the reduction."""
        op = reduce_op_name(op)
        if _needs_grad(input_):
            return DistributedAutograd.ReduceScatter.apply(self, input_, op, dim)
        self.check("reduce_scatter", input_)
        checks.check_reduce_op("reduce_scatter", self.unique_name, op, input_.dtype)
        dim = checks.check_chunks("reduce_scatter", self.unique_name, input_, dim, self.world_size)
        parts = layout.chunks_by_rank(input_, dim, self.world_size)
        output = self.transport.empty(parts.shape[1:], input_.dtype)
        arguments = {"op": op, "dim": dim}
        self._issue("reduce_scatter", input_, arguments, self.transport.reduce_scatter, output, parts, op)
        return output

    def all_to_all_4D(self, input_: Tensor, scatter_dim: int = 2, gather_dim: int = 1) -> Tensor:
        """(2, 1): ``[B, S/P, H, D] -> [B, S, H/P, D]``; (1, 2): the inverse."""
        if _needs_grad(input_):
            return DistributedAutograd.AllToAll4D.apply(self, input_, self.world_size, scatter_dim, gather_dim)
        return exchanges_4D.single(self, self._issue, input_, scatter_dim, gather_dim)

    def all_to_all_4D_coalesced(
        self, inputs: Sequence[Tensor], scatter_dim: int = 2, gather_dim: int = 1
    ) -> list[Tensor]:
        """`all_to_all_4D` of several tensors, each of its own shape and dtype, in one grouped exchange."""
        inputs = list(inputs)
        if any(map(_needs_grad, inputs)):
            return list(DistributedAutograd.AllToAll4DCoalesced.apply(self, scatter_dim, gather_dim, *inputs))
        return exchanges_4D.coalesced(self, self._issue, inputs, scatter_dim, gather_dim)

    def all_to_all_4D_packed(
        self, sends: Sequence[Tensor], scatter_dim: int, gather_dim: int, single: bool
    ) -> list[Tensor]:
        """4D exchanges of parts that a compiled graph has packed and will lay down: ``[P, ...]`` in, ``[P, ...]`` out.

        Recorded as the `all_to_all_4D` (or, not `single`, the coalesced one) that it was before.
        """
        return exchanges_4D.packed(self, self._issue, list(sends), scatter_dim, gather_dim, single)

    def start_all_to_all_4D(self, inputs: Sequence[Tensor], scatter_dim: int, gather_dim: int, form: str) -> Started:
        """Begin a 4D exchange that `Started.wait` ends; later calls of the group are issued behind it.

        For compiled code, which neither writes nor frees the inputs before the wait.

        Args:
            form: which of the calls above it stands for: "single", "coalesced", "packed single" or "packed coalesced".
        """
        if self._later is None:
            self._later = self._make_later()
        return exchanges_4D.start(self, self._later, list(inputs), scatter_dim, gather_dim, form)

    def all_to_all_single(
        self,
        input_: Tensor,
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
    ) -> Tensor:
        """Part j of dim 0 goes to rank j; the received parts are concatenated. Parts are equal without split sizes."""
        if _needs_grad(input_):
            return DistributedAutograd.AllToAllSingle.apply(self, input_, output_split_sizes, input_split_sizes)
        self.check("all_to_all_single", input_)
        checks.check_all_to_all_single(self.unique_name, input_, output_split_sizes, input_split_sizes, self.world_size)
        op, transport = "all_to_all_single", self.transport
        arguments = {"output_split_sizes": _tuple(output_split_sizes), "input_split_sizes": _tuple(input_split_sizes)}
        if output_split_sizes is None or input_split_sizes is None:
            output = transport.empty(input_.shape, input_.dtype)
            parts = [layout.chunks_by_rank(tensor, 0, self.world_size) for tensor in (output, input_)]
            self._issue(op, input_, arguments, transport.exchange, parts[:1], parts[1:])
        else:
            output = transport.empty((sum(output_split_sizes), *input_.shape[1:]), input_.dtype)
            rows = output_split_sizes, input_split_sizes
            self._issue(op, input_, arguments, transport.exchange_rows, output, input_, *rows)
        return output

    def broadcast(self, input_: Tensor, src: int = 0) -> Tensor:
        """The tensor of `src`, as a new tensor, on every rank."""
        self.check("broadcast", input_, differentiable=False)
        checks.check_place("broadcast", self.unique_name, "src", src, self.world_size)
        output = self.transport.like(input_)
        self._issue("broadcast", input_, {"src": src}, self.transport.broadcast, output, input_, src)
        return output

    def gather(self, input_: Tensor, dst: int = 0, dim: int = -1) -> Tensor | None:
        """On `dst`, the ranks' tensors concatenated along `dim`; None elsewhere."""
        self.check("gather", input_, differentiable=False)
        checks.check_place("gather", self.unique_name, "dst", dst, self.world_size)
        dim = checks.check_concat("gather", self.unique_name, input_, dim)
        output = self._room_for_all(input_, dim) if self.rank == dst else None
        parts = None if output is None else layout.chunks_by_rank(output, dim, self.world_size)
        self._issue("gather", input_, {"dst": dst, "dim": dim}, self.transport.gather, parts, input_, dst)
        return output

    def shard(self, input_: Tensor, dim: int = -1, *, scale_grad: bool = False) -> Tensor:
        """This rank's slice of `dim`; the gradient is gathered, divided by P with `scale_grad`."""
        if _needs_grad(input_):
            return DistributedAutograd.Slice.apply(self, input_, self.world_size, dim, scale_grad)
        self.check("shard", input_)
        dim = checks.check_chunks("shard", self.unique_name, input_, dim, self.world_size)
        size = input_.size(dim) // self.world_size
        return input_.narrow(dim, self.rank * size, size).clone(memory_format=torch.contiguous_format)

    slice = shard

    def send(self, tensor: Tensor, dst: int | None = None) -> None:
        """Send to place `dst` (default: the next)."""
        dst = (self.rank + 1) % self.world_size if dst is None else dst
        self.check("send", tensor, differentiable=False)
        checks.check_peer("send", self.unique_name, "dst", dst, self.rank, self.world_size)
        self._issue("send", tensor, {"dst": dst}, self.transport.send, tensor, dst)

    def recv(self, size: Sequence[int], dtype: torch.dtype, src: int | None = None) -> Tensor:
        """A tensor of `size` and `dtype` from place `src` (default: the previous)."""
        src = (self.rank - 1) % self.world_size if src is None else src
        checks.check_peer("recv", self.unique_name, "src", src, self.rank, self.world_size)
        output = self.transport.empty(size, dtype)
        self._issue("recv", output, {"src": src}, self.transport.recv, output, src)
        return output

    def barrier(self) -> None:
        """Return once every rank has called this; on the host, over the CPU group or shared memory."""
        self._issue("barrier", None, {}, self.transport.barrier)

    def destroy(self) -> None:
        """Release what this object holds; the process groups are their owner's. Safe to call twice.

        Waits for open sends, at most until the deadline; one that nobody received is reported as a warning.
        """
        try:
            if self._later is not None:
                self._later.close()
            self.transport.close()
        except RuntimeError as error:
            logger.warning("destroying group %r: %s", self.unique_name, error)

    def _make_transport(self) -> Any:
        """What carries the tensors; a subclass that has something better overrides this."""
        if self.world_size == 1:
            return SoloTransport(self.device)
        return ProcessGroupTransport(self.device_group, self.cpu_group, self.device, self.unique_name, self.timeout_s)

    def _make_later(self) -> Later:
        """What carries out exchanges that are started and not waited for yet."""
        return Worker(self) if self.device.type == "cpu" else AtOnce(self)

    def _room_for_all(self, input_: Tensor, dim: int) -> Tensor:
        """Memory for P tensors like `input_`, one after another along `dim`."""
        shape = list(input_.shape)
        shape[dim] *= self.world_size
        return self.transport.empty(shape, input_.dtype)

    def check(self, op: str, tensor: Tensor, differentiable: bool = True) -> None:
        """TypeError or ValueError unless the group's collectives take `tensor`."""
        # One test where all is well: this is on the path of every call.
        if tensor.layout is not _STRIDED or tensor.device != self.device:
            checks.check_strided(op, self.unique_name, tensor)
            checks.check_device(op, self.unique_name, tensor, self.device)
        if not differentiable:
            checks.check_no_grad(op, self.unique_name, tensor)

    def _issue(
        self,
        op: str,
        tensors: Tensor | list[Tensor] | None,
        arguments: dict[str, Any],
        call: Callable[..., Any],
        *args: Any,
    ) -> None:
        """Run the collective, seen by who wants to, and say in any error which one it was."""
        if self.failure:  # looked at here too: a call that does nothing is felt on this path
            self.refuse_if_broken(op)
        if self._later is not None:
            self._later.settle()
        self._carry_out(self._announce(op, tensors, arguments), call, args)

    def _announce(self, op: str, tensors: Tensor | list[Tensor] | None, arguments: dict[str, Any]) -> list[Any]:
        """Count the call and show it to who wants to see it; what `_carry_out` wants."""
        peer = _peer(op, arguments)
        # Collectives are counted alike on all ranks, messages between two ranks on both of them.
        way = "collective" if peer is None else f"{self.rank}-{peer}" if op == "send" else f"{peer}-{self.rank}"
        self._issued[way] = number = self._issued.get(way, 0) + 1
        noted = journal.begin(self.member, op, way, number, tensors, arguments)
        if observers:
            try:
                observe(Call(self.member, op, tuple(_list(tensors)), arguments, way, number))
            except BaseException as error:
                journal.finish(noted, True)
                self._judge(error, journal.Entry(*noted))
                raise
        return noted

    def _carry_out(self, noted: list[Any], call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        well = False
        try:
            call(*args)
            well = True
        except BaseException as error:  # an interrupt too: the other ranks are in the call
            self._judge(error, journal.Entry(*noted))
            raise
        finally:
            journal.finish(noted, not well)

    @contextlib.contextmanager
    def noting_objects(self, op: str, arguments: dict[str, Any]) -> Iterator[str]:
        """Inside, a call that moves objects is under way, `check_collectives` has compared it; its roll call's name."""
        sends = op.startswith("send")
        peer = None if op.startswith("broadcast") else arguments["dst" if sends else "src"]
        way = "collective" if peer is None else f"{self.rank}-{peer}" if sends else f"{peer}-{self.rank}"
        self._issued[way] = number = self._issued.get(way, 0) + 1
        noted, well = journal.begin(self.member, op, way, number, None, arguments), False
        try:
            debug_check.compare_objects(self.member, op, arguments, way, number)
            yield f"{way} {number}"
            well = True
        except debug_check.MismatchError as error:
            self.break_with(f"{type(error).__name__} in {op}: {error}")
            raise
        finally:
            journal.finish(noted, not well)

    def refuse_if_broken(self, op: str) -> None:
        """RuntimeError when an earlier call failed."""
        if self.failure:
            raise RuntimeError(
                f"{checks.where(op, self.unique_name)}: this group is broken since an earlier error, for its ranks may "
                "be in different calls. Initialize again, after cleanup_dist_env_and_memory(). "
                f"The error was: {self.failure}"
            )

    def break_with(self, reason: str) -> None:
        """Refuse every later call with `reason`, and tell the ranks that wait for this one, where that is possible."""
        if not self.failure and self.world_size > 1:
            self.failure = reason
            self.transport.give_up(reason)

    def _judge(self, error: BaseException, entry: journal.Entry) -> None:
        """Raise `error` with what the group knows of it, and break the group unless nothing was sent."""
        peer = _peer(entry.op, entry.arguments)
        if isinstance(error, RefusedError):
            raise RefusedError(f"{checks.where(entry.op, self.unique_name)}: {error}") from error
        if isinstance(error, (TypeError, ValueError)):
            return
        if not isinstance(error, RuntimeError) or isinstance(error, debug_check.MismatchError):
            # An interrupt in the middle of a call, or a call that the ranks do not agree on.
            self.break_with(f"{type(error).__name__} in {entry}: {error}")
            return
        # A transport that knows who is at fault says so itself.
        missing = getattr(error, "places", ())
        if missing:
            who = self.roll_call.names(missing, self.ranks)
        else:
            expected = range(self.world_size) if peer is None else [peer]
            who = self.roll_call.describe(f"{entry.way} {entry.number}", expected, self.ranks)
        of = ", ".join(f"{tuple(shape)} {entry.dtype}" for shape in entry.shapes)
        kind = f"call {entry.number}" if peer is None else f"message {entry.number} on the way {entry.way}"
        explained = RuntimeError(
            f"{checks.where(entry.op, self.unique_name)}{of and f' of {of}'}, {kind}, failed "
            f"on place {self.rank} of {self.world_size} (global ranks {self.ranks}, deadline {self.timeout_s:g} s); "
            f"{who}. The transport says: {error}"
        )
        self.break_with(str(explained))
        raise explained from error


def _peer(op: str, arguments: dict[str, Any]) -> int | None:
    """The place at the other end of a message; None for a collective."""
    return arguments["src"] if op == "recv" else arguments["dst"] if op == "send" else None


def _list(tensors: Tensor | list[Tensor] | None) -> list[Tensor]:
    return [] if tensors is None else [tensors] if isinstance(tensors, Tensor) else tensors


def _needs_grad(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def _tuple(sizes: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if sizes is None else tuple(sizes)


# Last, because its Functions call back into the class above.
from fvops.device_communicators.distributed_autograd import DistributedAutograd  # noqa: E402
