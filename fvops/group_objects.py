"""The part of `GroupCoordinator` that moves objects and dictionaries: over the CPU group and the message queue."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fvops import checks, objects, registry, tensor_dict
from fvops.device_communicators.base_device_communicator import DeviceCommunicatorBase
from fvops.device_communicators.pending_sends import PendingSends
from fvops.device_communicators.shm_broadcast import MessageQueue
from fvops.logger import init_logger
from fvops.objects import Wire
from fvops.serialization import decode
from fvops.tensor_dict import Manifest, wire_bytes
from fvops.torch_compat import all_gather_flat

__all__ = ["GroupObjects"]

logger = init_logger(__name__)


class GroupObjects:
    """Methods for objects; `GroupCoordinator` sets the attributes. `src` and `dst` are places in the group."""

    ranks: list[int]
    world_size: int
    rank_in_group: int
    unique_name: str
    device: torch.device
    cpu_group: dist.ProcessGroup
    device_group: dist.ProcessGroup
    timeout_s: float
    mq_broadcaster: MessageQueue | None = None
    _communicator: DeviceCommunicatorBase | None
    _object_sends: PendingSends | None = None

    def broadcast_object(self, obj: Any | None = None, src: int = 0) -> Any:
        """`obj` of place `src`, on every rank. See `fvops.utils.add_safe_globals` for what may travel.

        Raises:
            TypeError: `obj` holds what may not travel; on every rank.
            ValueError: `src` is no place, or not 0 in a group with a message queue.
            RuntimeError: a rank did not come in time.
        """
        where = self._check_object_call("broadcast_object", "src", src)
        if self.world_size == 1:
            return obj
        with self._noting("broadcast_object", src=src) as call:
            if self.mq_broadcaster is not None:
                return self._over_the_queue(where, obj, src)
            with self._naming(where, call) as wire:
                return objects.broadcast([obj], self.ranks[src], self.cpu_group, wire)[0]

    def broadcast_object_list(
        self, obj_list: list[Any], src: int = 0, group: dist.ProcessGroup | None = None
    ) -> list[Any]:
        """Replace the items of `obj_list`, in place, by those of place `src`, and return it. Raises as above.

        Args:
            group: process group for CPU tensors to send over; default the message queue or the CPU group.
        """
        where = self._check_object_call("broadcast_object_list", "src", src)
        if self.world_size == 1:
            return obj_list
        with self._noting("broadcast_object_list", src=src) as call:
            if group is None and self.mq_broadcaster is not None:
                obj_list[:] = self._over_the_queue(where, list(obj_list), src)
                return obj_list
            with self._naming(where, call) as wire:
                over = self.cpu_group if group is None else group
                obj_list[:] = objects.broadcast(obj_list, self.ranks[src], over, wire)
        return obj_list

    def send_object(self, obj: Any, dst: int) -> None:
        """Send `obj` to place `dst`; may return before the receiver asks.

        Raises:
            TypeError: `obj` holds what may not travel; the receiver raises it too.
            RuntimeError: the group has one rank, or an earlier send was not received within the deadline.
        """
        where = self._check_partner("send_object", "dst", dst)
        message = objects.pack(obj)
        with self._noting("send_object", dst=dst), self._naming(where, "") as wire:
            objects.send_message(message, self.ranks[dst], self.cpu_group, self._sends(), wire)

    def recv_object(self, src: int) -> Any:
        """The object that place `src` sends.

        Raises:
            TypeError: the sender could not encode it, or this rank has not allowed a class in it.
            ValueError: what came is damaged, or too large.
            RuntimeError: the group has one rank, or nothing came within the deadline.
        """
        where = self._check_partner("recv_object", "src", src)
        with self._noting("recv_object", src=src) as call, self._naming(where, call) as wire:
            return decode(objects.recv_message(self.ranks[src], self.cpu_group, wire))

    def broadcast_tensor_dict(
        self,
        tensor_dict: dict[Any, Any] | None = None,
        src: int = 0,
        group: dist.ProcessGroup | None = None,
        metadata_group: dist.ProcessGroup | None = None,
    ) -> dict[Any, Any] | None:
        """The dictionary of place `src`, on every rank: nested, with tensors and other objects. Values only.

        Tensors on the CPU arrive there, those on the sender's device on each receiver's.

        Args:
            group: process group for tensors on the device; default the device group.
            metadata_group: process group for all else; default the CPU group.

        Raises:
            TypeError: not a dictionary, or something in it may not travel; on every rank.
            ValueError: `src` is no place, or a tensor is neither on the CPU nor on the group's device.
        """
        where = self._check_object_call("broadcast_tensor_dict", "src", src)
        if self.world_size == 1:
            return tensor_dict
        over = {"cpu": metadata_group or self.cpu_group, "device": group or self.device_group}
        root = self.ranks[src]

        def fetch(_: Manifest, tensor: Tensor) -> None:
            dist.broadcast(wire_bytes(tensor), src=root, group=over["cpu" if tensor.device.type == "cpu" else "device"])

        with self._noting("broadcast_tensor_dict", src=src) as call, self._naming(where, call) as wire:
            if self.rank_in_group != src:
                manifest = objects.broadcast_message(None, root, over["cpu"], wire)
                return _dictionary(manifest, self.device, where, fetch, wire)
            message, tensors = _pack(tensor_dict, self.device, where)
            objects.broadcast_message(message, root, over["cpu"], wire)
            with wire.message():
                for tensor in tensors:
                    if tensor.numel():
                        fetch(_NO_MANIFEST, tensor)
        return tensor_dict

    def send_tensor_dict(
        self, tensor_dict: dict[Any, Any], dst: int | None = None, all_gather_group: Any | None = None
    ) -> dict[Any, Any] | None:
        """Send a dictionary to place `dst` (default: the next), as `broadcast_tensor_dict` takes it.

        May return before the receiver asks. A group of one rank returns `tensor_dict`.

        Args:
            all_gather_group: a `GroupCoordinator` whose ranks all hold the same dictionary, and send it to ranks that
                form such a group too: of a tensor whose numel divides, each sends its part.
        """
        dst = (self.rank_in_group + 1) % self.world_size if dst is None else dst
        where = self._check_object_call("send_tensor_dict", "dst", dst)
        if self.world_size == 1:
            return tensor_dict
        self._check_partner("send_tensor_dict", "dst", dst)
        n, k = (1, 0) if all_gather_group is None else (all_gather_group.world_size, all_gather_group.rank_in_group)
        message, tensors = _pack(tensor_dict, self.device, where, (n, k))
        with self._noting("send_tensor_dict", dst=dst), self._naming(where, "") as wire:
            objects.send_message(message, self.ranks[dst], self.cpu_group, self._sends(), wire)
            with wire.message():
                for tensor in tensors:
                    if tensor.numel():
                        self._send_bytes(_part(wire_bytes(tensor), tensor.numel(), n, k), dst, tensor)
        return None

    def recv_tensor_dict(self, src: int | None = None, all_gather_group: Any | None = None) -> dict[Any, Any] | None:
        """The dictionary that place `src` (default: the previous) sends; None in a group of one rank.

        Args:
            all_gather_group: this rank's, with as many ranks as the sender's; the parts are gathered over it.

        Raises:
            TypeError, ValueError: as `broadcast_tensor_dict`; also when the sender cut its tensors for another group.
        """
        src = (self.rank_in_group - 1) % self.world_size if src is None else src
        where = self._check_object_call("recv_tensor_dict", "src", src)
        if self.world_size == 1:
            return None
        self._check_partner("recv_tensor_dict", "src", src)
        own = (1, 0) if all_gather_group is None else (all_gather_group.world_size, all_gather_group.rank_in_group)

        sent: set[tuple[int, int]] = {own}

        def fetch(manifest: Manifest, tensor: Tensor) -> None:
            sent.add(manifest.parts)
            whole = wire_bytes(tensor)
            part = _part(whole, tensor.numel(), *manifest.parts)
            if part.numel() == whole.numel():
                self._recv_bytes(whole, src)
                return
            part = torch.empty_like(part)
            self._recv_bytes(part, src)
            if manifest.parts != own:
                # Not a group to gather over; received all the same, so that the next message can be.
                return
            if tensor.device.type == "cpu":
                all_gather_flat(whole, part, group=all_gather_group.cpu_group)  # type: ignore[union-attr]
            else:
                whole.copy_(all_gather_group.all_gather(part, dim=0))  # type: ignore[union-attr]

        with self._noting("recv_tensor_dict", src=src) as call, self._naming(where, call) as wire:
            message = objects.recv_message(self.ranks[src], self.cpu_group, wire)
            received = _dictionary(message, self.device, where, fetch, wire)
        for n, k in sent - {own}:
            raise ValueError(
                f"{where}: the sender is part {k} of {n} of its all_gather_group, this rank {own[1]} of {own[0]}; "
                "both sides need groups alike"
            )
        return received

    def _over_the_queue(self, where: str, obj: Any, src: int) -> Any:
        if src != 0:
            raise ValueError(f"{where}: the group has a message queue, which place 0 writes; src must be 0, got {src}")
        with self._naming(where, "") as wire:
            queue: MessageQueue = self.mq_broadcaster  # type: ignore[assignment]
            wire.began = wire.cut = True
            try:
                obj = queue.broadcast_object(obj, self.timeout_s)
            except Exception as error:
                # What was refused whole leaves the queue as it was.
                lost = isinstance(error, RuntimeError | TimeoutError) and not isinstance(error, RecursionError)
                wire.cut = lost or bool(queue.failure)
                if isinstance(error, TimeoutError):
                    raise RuntimeError(str(error)) from error
                raise
            wire.cut = False
            return obj

    @contextlib.contextmanager
    def _naming(self, where: str, call: str) -> Iterator[Wire]:
        """Errors inside say `where` they were; those in the middle of a message break the group.

        Args:
            call: what its ranks call this call, to ask each other who came; empty where the error says that itself.
        """
        wire = Wire()
        try:
            yield wire
        except BaseException as error:
            # Refused before anything passed, or after all has: the group goes on. An interrupt may lose the object.
            if not wire.cut and (isinstance(error, Exception) or not wire.began):
                raise
            if self.mq_broadcaster is not None:
                # Who waits for this rank's next object, or for it to read one, is told at once.
                self.mq_broadcaster.close()
            explained = self._explained(where, call, error)
            if self._communicator is not None:
                self._communicator.break_with(str(explained or f"{type(error).__name__} in {where}: {error}"))
            if explained is None:
                raise
            raise explained from error

    def _explained(self, where: str, call: str, error: BaseException) -> Exception | None:
        """`error` with what the group knows of it; None where it is not the group's (an interrupt)."""
        if isinstance(error, TypeError | ValueError):
            kind = TypeError if isinstance(error, TypeError) else ValueError
            return kind(f"{'' if str(error).startswith(where) else where + ': '}{error}")
        if not isinstance(error, RuntimeError) or isinstance(error, RecursionError):
            return None
        who = ""
        if call and self._communicator is not None and not self._communicator.failure:
            way = call.partition(" ")[0]
            expected = range(self.world_size) if way == "collective" else [int(way.partition("-")[0])]
            who = self._communicator.roll_call.describe(call, expected, self.ranks) + ". "
        return RuntimeError(
            f"{where} failed on place {self.rank_in_group} of {self.world_size} (global ranks {self.ranks}, deadline "
            f"{self.timeout_s:g} s); {who}The transport says: {error}"
        )

    def _check_object_call(self, op: str, what: str, place: int) -> str:
        registry.resolve(self.unique_name, self.world_size).refuse_if_broken(op)
        checks.check_place(op, self.unique_name, what, place, self.world_size)
        return checks.where(op, self.unique_name)

    def _check_partner(self, op: str, what: str, place: int) -> str:
        where = checks.where(op, self.unique_name)
        if self.world_size == 1:
            raise RuntimeError(f"{where}: a group of one rank has no partner")
        registry.resolve(self.unique_name, self.world_size).refuse_if_broken(op)
        checks.check_peer(op, self.unique_name, what, place, self.rank_in_group, self.world_size)
        return where

    def _noting(self, op: str, **arguments: int) -> AbstractContextManager[str]:
        """Inside, the call is under way; before, under `check_collectives`, the other ranks are about to do it too."""
        return registry.resolve(self.unique_name, self.world_size).noting_objects(op, arguments)

    def _sends(self) -> PendingSends:
        if self._object_sends is None:
            self._object_sends = PendingSends(self.unique_name)
        return self._object_sends

    def _send_bytes(self, data: Tensor, dst: int, owner: Tensor) -> None:
        if data.device.type != "cpu":
            registry.resolve(self.unique_name, self.world_size).send(data, dst)
            return
        if data.untyped_storage().data_ptr() == owner.untyped_storage().data_ptr():
            # The caller may overwrite its tensor as soon as this returns.
            data = data.clone()
        work: Any = dist.isend(data, dst=self.ranks[dst], group=self.cpu_group, tag=objects.TAG)
        self._sends().add(work.wait, data)

    def _recv_bytes(self, into: Tensor, src: int) -> None:
        if into.device.type == "cpu":
            dist.recv(into, src=self.ranks[src], group=self.cpu_group, tag=objects.TAG)
        else:
            into.copy_(registry.resolve(self.unique_name, self.world_size).recv(into.shape, into.dtype, src))

    def _close_objects(self) -> None:
        """Let go of the queue, and wait, unless the group is broken, for sends that are still open."""
        broken = self._communicator is not None and self._communicator.failure
        if self.mq_broadcaster is not None:
            self.mq_broadcaster.close()
            self.mq_broadcaster = None
        if self._object_sends is not None:
            try:
                self._object_sends.drain(0.0 if broken else self.timeout_s)
            except RuntimeError as error:
                logger.warning("destroying group %r: %s", self.unique_name, error)
            self._object_sends = None


# Aliases: in the methods above the module's name is an argument's.
_pack, _dictionary = tensor_dict.pack_dict, tensor_dict.receive
_NO_MANIFEST = Manifest((1, 0), [], b"")


def _part(whole: Tensor, numel: int, n: int, k: int) -> Tensor:
    """Part k of n of a tensor's bytes; all of them where its `numel` does not divide."""
    return whole if numel % n else whole.view(n, -1)[k]
