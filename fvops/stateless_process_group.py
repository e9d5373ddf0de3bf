"""A group over a `torch.distributed.Store` alone: it leaves torch's global state as it is. For objects, not tensors.

Groups may overlap, come and go, and share a store. Keys are scoped: by the group's name (`over_store`), by how often
each rank has joined a group of that name, and by sender, receiver and a counter; so messages of an earlier group, or of
another sender, are never met.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fvops import envs, store_messages
from fvops.objects import Message, pack
from fvops.rendezvous import listen
from fvops.serialization import decode

__all__ = ["StatelessProcessGroup"]

_SENT, _FAILED = b"\0", b"\1"


class _LateError(RuntimeError):
    """Another rank did not come within the deadline; the text says which."""


class _UnsentError(Exception):
    """An object could not be encoded, which its receivers were told; `reason` is what its own code raised."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


@dataclass
class StatelessProcessGroup:
    """`world_size` processes that share `store`; this one is `rank`. Every wait ends after `timeout_s`.

    Every rank must make the group, the k-th time on one rank meeting the k-th time on the others. Not for several
    threads at once.

    Once `broadcast_obj`, `all_gather_obj` or `barrier` has failed or was interrupted, or the store cannot be asked any
    more, the ranks may be in different calls: every later call raises RuntimeError with that first error. A `recv_obj`
    that nothing came for in time may be repeated. What may not travel (TypeError, ValueError) breaks nothing.

    Args:
        data_expiration_seconds: messages that nobody has read are removed after so long.
        timeout_s: deadline of each wait for the other ranks, seconds; default ``FVOPS_TIMEOUT_S``.
        name: what errors call the group; `create` gives it its store's address, `over_store` the name there.

    Raises:
        ValueError: `rank` is not in ``range(world_size)``, or `timeout_s` is no finite number above 0.
        RuntimeError: the store cannot be reached.
    """

    rank: int
    world_size: int
    store: Any
    data_expiration_seconds: float = 3600
    send_dst_counter: dict[int, int] = field(default_factory=dict)
    recv_src_counter: dict[int, int] = field(default_factory=dict)
    broadcast_send_counter: int = 0
    broadcast_recv_src_counter: dict[int, int] = field(default_factory=dict)
    entries: deque[tuple[str, float]] = field(default_factory=deque)
    timeout_s: float | None = field(default=None, kw_only=True)
    name: str = field(default="without a name", kw_only=True)
    _life: int = field(default=0, init=False, repr=False)
    _barriers: int = field(default=0, init=False, repr=False)
    _seconds: float = field(default=0.0, init=False, repr=False)
    _failure: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank} is not in a group of {self.world_size}")
        self._seconds = envs.deadline(self.timeout_s)
        everyone = range(self.world_size)
        for counter in (self.send_dst_counter, self.recv_src_counter, self.broadcast_recv_src_counter):
            counter.update({place: 0 for place in everyone if place not in counter})
        with self._during("joining", collective=True):
            self._life = int(self.store.add(f"fvops/joined/{self.world_size}/{self.rank}", 1))

    @staticmethod
    def create(
        host: str,
        port: int,
        rank: int,
        world_size: int,
        data_expiration_seconds: float = 3600,
        *,
        timeout_s: float | None = None,
    ) -> StatelessProcessGroup:
        """A group with a store of its own, which rank 0 serves on ``host:port``: on that address only.

        Args:
            timeout_s: as for the class; also how long rank 0 is waited for here.

        Raises:
            ValueError: `rank`, `port` or `timeout_s` is out of range.
            RuntimeError: `host` is no address of rank 0's machine, the port is taken, or rank 0 cannot be reached
                within `timeout_s`.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not in a group of {world_size}")
        if not 0 < port < 65536:
            raise ValueError(f"port={port} is no TCP port; 1 to 65535 are")
        deadline = timedelta(seconds=envs.deadline(timeout_s))
        # Given no socket, torch's store listens on all interfaces.
        listening: dict[str, Any] = {} if rank else {"master_listen_fd": _listening_descriptor(host, port)}
        try:
            store = dist.TCPStore(
                host, port, is_master=rank == 0, timeout=deadline, wait_for_workers=False, **listening
            )
        except RuntimeError as error:
            raise RuntimeError(f"rank {rank} cannot reach the store of rank 0 at {host}:{port}: {error}") from error
        return StatelessProcessGroup(
            rank, world_size, store, data_expiration_seconds, timeout_s=timeout_s, name=f"{host}:{port}"
        )

    @staticmethod
    def over_store(
        store: dist.Store,
        name: str,
        rank: int,
        world_size: int,
        data_expiration_seconds: float = 3600,
        *,
        timeout_s: float | None = None,
    ) -> StatelessProcessGroup:
        """A group over a store that others use too: all its keys begin with `name`. An addition of ours."""
        scoped = dist.PrefixStore(f"fvops/stateless/{name}", store)
        return StatelessProcessGroup(rank, world_size, scoped, data_expiration_seconds, timeout_s=timeout_s, name=name)

    def send_obj(self, obj: Any, dst: int) -> None:
        """Leave `obj` for rank `dst`, without waiting for it.

        Raises:
            TypeError: `obj` holds what may not travel; the receiver raises it too.
            ValueError: `dst` is no other rank of the group.
            RuntimeError: the store is gone, or the group is broken.
        """
        self._check_peer("dst", dst)
        with self._during("send_obj"):
            count = self.send_dst_counter[dst]
            self.send_dst_counter[dst] += 1
            self._put(f"sent/{self.rank}-{dst}/{count}", pack(obj))

    def recv_obj(self, src: int) -> Any:
        """The next object that rank `src` sends to this one.

        Raises:
            TypeError: `src` could not encode it, or this rank has not allowed a class in it.
            ValueError: what came is damaged or too large, or `src` is no other rank of the group.
            RuntimeError: nothing came in time (it may be called again), the store is gone, or the group is broken.
        """
        self._check_peer("src", src)
        with self._during("recv_obj"):
            data, names = self._take(f"sent/{src}-{self.rank}/{self.recv_src_counter[src]}", src)
            self.recv_src_counter[src] += 1
            store_messages.delete(self.store, names)
            return self._open(data, src)

    def broadcast_obj(self, obj: Any, src: int) -> Any:
        """`obj` of rank `src`, on every rank; the others' is not looked at. `src` does not wait.

        Raises:
            TypeError, ValueError: as `recv_obj`.
            RuntimeError: nothing came in time, or the store is gone; either breaks the group. Or it is broken.
        """
        if not 0 <= src < self.world_size:
            raise ValueError(f"src={src} is not a rank of this group; ranks are 0 to {self.world_size - 1}")
        with self._during("broadcast_obj", collective=True):
            return self._broadcast(obj, src)

    def _broadcast(self, obj: Any, src: int) -> Any:
        if self.rank == src:
            count = self.broadcast_send_counter
            self.broadcast_send_counter += 1
            message = pack(obj)
            if self.world_size > 1 or message.failure is not None:
                self._put(f"broadcast/{src}/{count}", message)
            return obj
        key = f"broadcast/{src}/{self.broadcast_recv_src_counter[src]}"
        data, names = self._take(key, src)
        self.broadcast_recv_src_counter[src] += 1
        read = self._key(f"{key}/read")
        if self.store.add(read, 1) == self.world_size - 1:
            store_messages.delete(self.store, [*names, read])
        return self._open(data, src)

    def all_gather_obj(self, obj: Any) -> list[Any]:
        """The ranks' objects, by rank; raises as `broadcast_obj`, when all have been read."""
        failure: Exception | None = None
        gathered: list[Any] = []
        with self._during("all_gather_obj", collective=True):
            for src in [self.rank, *(place for place in range(self.world_size) if place != self.rank)]:
                try:
                    gathered.append(self._broadcast(obj, src))
                except (TypeError, ValueError, RecursionError, _UnsentError) as error:
                    failure = failure or error
            if failure is not None:
                raise failure
        gathered.insert(self.rank, gathered.pop(0))
        return gathered

    def barrier(self) -> None:
        """Return once every rank has come. Rank 0, which may serve the store, returns last.

        Raises:
            RuntimeError: ranks did not come within `timeout_s`, they are named; or the store is gone. Either breaks the
                group. Or it is broken.
        """
        with self._during("barrier", collective=True):
            self._meet()

    def _meet(self) -> None:
        count = self._barriers
        self._barriers += 1
        came, left = (
            [self._key(f"barrier/{count}/{what}/{r}") for r in range(self.world_size)] for what in ("in", "out")
        )
        self.store.set(came[self.rank], "")
        self._wait(came, f"barrier {count}")
        self.store.set(left[self.rank], "")
        if self.rank == 0:
            # The others ask the store nothing more for this barrier: it may go away after it.
            self._wait(left, f"the end of barrier {count}")
            store_messages.delete(self.store, [*came, *left])

    def expire_data(self) -> None:
        """Forget messages that were read, and remove those older than `data_expiration_seconds` from the store."""
        with self._during("expire_data"):
            self._expire()

    def _expire(self) -> None:
        now = time.monotonic()
        while self.entries:
            key, sent = self.entries[0]
            if now - sent > self.data_expiration_seconds:
                self.store.delete_key(key)
            elif self.store.check([key]):
                return
            self.entries.popleft()

    @contextlib.contextmanager
    def _during(self, op: str, collective: bool = False) -> Iterator[None]:
        """Errors inside say in which call of which group they were, and break it where ranks may now differ."""
        where = f"StatelessProcessGroup.{op} on group {self.name!r}, rank {self.rank} of {self.world_size}"
        if self._failure:
            raise RuntimeError(
                f"{where}: this group is broken since an earlier error, for its ranks may be in different calls; make "
                f"another. The error was: {self._failure}"
            )
        try:
            yield
        except _UnsentError as error:
            raise error.reason from None
        except (TypeError, ValueError, RecursionError):
            # One object could not be read; nobody waits for what will not come.
            raise
        except _LateError as error:
            text = f"{where}: {error}"
            if collective:
                self._failure = text
            raise RuntimeError(text) from error
        except RuntimeError as error:  # DistStoreError and DistNetworkError are RuntimeErrors
            self._failure = f"{where}: the store does not answer, its server may be gone: {error}"
            raise RuntimeError(self._failure) from error
        except BaseException as error:
            # An interrupt: part of the call is done, and the other ranks are in it.
            self._failure = f"{where}: {type(error).__name__}: {error}"
            raise

    def _key(self, name: str) -> str:
        return f"fvops/{self.world_size}/{self._life}/{name}"

    def _put(self, name: str, message: Message) -> None:
        self._expire()
        mark = _SENT if message.failure is None else _FAILED
        names = store_messages.put(self.store, self._key(name), mark + message.data)
        self.entries.extend((key, time.monotonic()) for key in names)
        if message.failure is not None:
            raise _UnsentError(message.failure)

    def _take(self, name: str, src: int) -> tuple[bytearray, list[str]]:
        seconds = self._seconds
        try:
            return store_messages.take(self.store, self._key(name), seconds)
        except store_messages.StoreTimeout as error:
            raise _LateError(f"waited {seconds:g} s for an object of rank {src}: {error}") from error

    def _open(self, data: bytearray, src: int) -> Any:
        if data[:1] == _FAILED:
            raise TypeError(f"rank {src} could not send its object: {data[1:2000].decode(errors='replace')}")
        if data[:1] != _SENT:
            raise ValueError(f"rank {src} sent what is no message: {bytes(data[:20])!r}")
        return decode(memoryview(data)[1:])

    def _wait(self, keys: list[str], what: str) -> None:
        seconds = self._seconds
        try:
            store_messages.wait_for(self.store, keys, seconds)
        except store_messages.StoreTimeout as error:
            absent = [int(key.rpartition("/")[2]) for key in error.keys]
            raise _LateError(f"waited {seconds:g} s at {what}; missing: ranks {absent}") from error

    def _check_peer(self, what: str, place: int) -> None:
        if not 0 <= place < self.world_size or place == self.rank:
            raise ValueError(
                f"{what}={place} is not another rank of this group; this is rank {self.rank} of {self.world_size}"
            )


def _listening_descriptor(host: str, port: int) -> int:
    """A descriptor that listens on ``host:port`` and no other address; the store closes it."""
    try:
        return listen(host, port).detach()
    except OSError as error:
        raise RuntimeError(
            f"rank 0 cannot listen on {host}:{port}, which must be an address of its machine and a free port: {error}"
        ) from error
