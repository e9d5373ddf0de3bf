"""`MessageQueue`: objects from one rank to all others of its group, without a collective.

Readers on the writer's node read a ring in shared memory (`shm_ring`); a waiting one sleeps. Readers elsewhere, or
where there is no shared memory or futex, get the same bytes over the group's store: no socket is opened for it. Objects
larger than a chunk take several.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from fvops import envs, objects, store_messages
from fvops.device_communicators.shm import futex, unnamed_file
from fvops.device_communicators.shm.peers import Identity, Peer, own_identity
from fvops.device_communicators.shm_ring import Ring, RingReader, RingWriter, ring_bytes
from fvops.logger import init_logger
from fvops.serialization import decode
from fvops.stateless_process_group import StatelessProcessGroup

__all__ = ["MessageQueue"]

logger = init_logger(__name__)

# A tmpfs; tests put another folder here for a rank, which then is as if on another node.
SHARED_FOLDER = "/dev/shm"
_SENT, _FAILED = b"\0", b"\1"


class MessageQueue:
    """One rank's end of a queue; make it with `create_from_process_group`. For one thread at a time.

    Args:
        place: this rank's place in the group.
        writer: the writer's.
        ring: this end of the shared memory, if it has one.
        remote: this end of the store, if it has one.
    """

    def __init__(
        self,
        place: int,
        writer: int,
        ring: RingWriter | RingReader | None,
        remote: _StoreWriter | _StoreReader | None,
    ) -> None:
        self.place = place
        self.writer_rank = writer
        self.is_writer = place == writer
        self._ends = [end for end in (ring, remote) if end is not None]
        self._broken = ""

    @staticmethod
    def create_from_process_group(
        pg: dist.ProcessGroup | StatelessProcessGroup, max_chunk_bytes: int, max_chunks: int, writer_rank: int = 0
    ) -> MessageQueue:
        """A queue from place `writer_rank` of `pg` to the others. Collective.

        Args:
            pg: a group for CPU tensors (gloo), or a StatelessProcessGroup.
            max_chunk_bytes: size of a slot of the ring; larger objects take several.
            max_chunks: slots in the ring: when all are unread, the writer waits.

        Raises:
            ValueError: a size below 1, no such place, or arguments that differ between ranks; on every rank.
        """
        place, places, store = _describe(pg)
        sizes = (max_chunk_bytes, max_chunks, writer_rank)
        folder, key = SHARED_FOLDER, secrets.token_hex(32)
        descriptor, why = -1, "not the writer"
        address: dict[str, Any] = {}
        try:
            if place == writer_rank and min(sizes[:2]) > 0:
                nbytes = ring_bytes(max_chunk_bytes, max_chunks, places - 1)
                descriptor, why, address = _make(folder, nbytes)
            offers = _gather(pg, places, {"sizes": sizes, "file": address, "key": key, "identity": _identity()})
            _check_sizes([tuple(other["sizes"]) for other in offers], places)
            writer = offers[writer_rank]
            end: RingWriter | RingReader | None = None
            if place != writer_rank and writer["file"]:
                end = _open(unnamed_file.Address(**writer["file"]), folder, sizes, place, places)
            # Also the moment at which all who can have opened the file.
            local = _gather(pg, places, end is not None)
            ring_places = [other for other in range(places) if other != writer_rank and local[other]]
            far = [other for other in range(places) if other != writer_rank and not local[other]]
            if place == writer_rank and ring_places:
                end = _writing_end(descriptor, sizes, places, ring_places, offers)
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        remote: _StoreWriter | _StoreReader | None = None
        prefix = f"fvops/queue/{writer['key']}"
        if far and place == writer_rank:
            logger.info("message queue: places %s read over the store (%s)", far, why or "another node")
            remote = _StoreWriter(store_messages.own_client(store, prefix), far, max_chunks)
        elif place in far:
            remote = _StoreReader(store_messages.own_client(store, prefix), place, len(far), writer_rank)
        return MessageQueue(place, writer_rank, end, remote)

    def enqueue(self, obj: Any, timeout: float | None = None) -> None:
        """Write `obj`, waiting for room at most `timeout` seconds (default ``FVOPS_TIMEOUT_S``).

        Raises:
            TimeoutError: the ring stayed full. The queue can be used on, unless part of `obj` was written.
            TypeError: `obj` holds what may not travel; the readers raise it too.
            RuntimeError: this is not the writer, a reader for which room is needed has died or left, the queue is
                closed or broken.
        """
        self._check(writes=True)
        message = objects.pack(obj)
        seconds, until = _deadline(timeout)
        frame = (_SENT if message.failure is None else _FAILED) + message.data
        for end in self._ends:
            with self._naming("enqueue", seconds):
                end.wait_for_room(until)  # type: ignore[union-attr]
        for end in self._ends:
            with self._breaking(), self._naming("enqueue", seconds):
                end.write(frame, until)  # type: ignore[union-attr]
        if message.failure is not None:
            raise message.failure

    def dequeue(self, timeout: float | None = None) -> Any:
        """The next object, waiting for it at most `timeout` seconds (default ``FVOPS_TIMEOUT_S``), asleep.

        Raises:
            TimeoutError: none came. The queue can be used on, unless part of one came.
            TypeError: the writer could not encode it, or this rank has not allowed a class in it.
            ValueError: what came is damaged, or too large.
            RuntimeError: this is the writer; it has died or left; the queue is closed or broken.
        """
        self._check(writes=False)
        seconds, until = _deadline(timeout)
        with self._naming("dequeue", seconds):
            self._ends[0].wait_for_chunk(until)  # type: ignore[union-attr]
        with self._breaking(), self._naming("dequeue", seconds):
            frame = self._ends[0].read(until)  # type: ignore[union-attr]
        if frame[:1] == _FAILED:
            raise TypeError(
                f"place {self.writer_rank} could not send its object: {frame[1:2000].decode(errors='replace')}"
            )
        if frame[:1] != _SENT:
            raise ValueError(f"place {self.writer_rank} wrote what is no message: {bytes(frame[:20])!r}")
        return decode(memoryview(frame)[1:])

    def broadcast_object(self, obj: Any | None = None, timeout: float | None = None) -> Any:
        """`obj` of the writer, on every rank: `enqueue` there, `dequeue` elsewhere. Raises as they do."""
        if self.is_writer:
            self.enqueue(obj, timeout)
            return obj
        return self.dequeue(timeout)

    @property
    def failure(self) -> str:
        """Why the queue cannot be used any more; empty while it can."""
        return self._broken

    def close(self) -> None:
        """Leave the queue; the others are told when they next wait for this rank. Safe to call twice."""
        for end in self._ends:
            end.close()
        self._ends = []
        self._broken = self._broken or "it was closed"

    def _check(self, writes: bool) -> None:
        if self._broken:
            raise RuntimeError(f"the message queue cannot be used any more: {self._broken}")
        if writes is not self.is_writer:
            raise RuntimeError(
                f"place {self.place} cannot {'enqueue' if writes else 'dequeue'}: the queue's writer is place "
                f"{self.writer_rank}"
            )

    @contextlib.contextmanager
    def _naming(self, op: str, seconds: float) -> Any:
        try:
            yield
        except TimeoutError as error:
            raise TimeoutError(f"MessageQueue.{op} on place {self.place} after {seconds:g} s: {error}") from error
        except RuntimeError as error:
            raise RuntimeError(f"MessageQueue.{op} on place {self.place}: {error}") from error

    @contextlib.contextmanager
    def _breaking(self) -> Any:
        """After an error in the middle of an object the ends do not agree on where they are."""
        try:
            yield
        except BaseException as error:  # whatever it was, an interrupt too: the stream is cut in the middle
            self._broken = f"it failed in the middle of an object ({type(error).__name__}: {error})"
            self.close()
            raise


class _StoreWriter:
    """The writing side over a store, for the places `readers`: at most `most` messages wait there."""

    def __init__(self, store: Any, readers: list[int], most: int) -> None:
        self._store, self._readers, self._most = store, readers, most
        self._count = 0

    def wait_for_room(self, until: float) -> None:
        oldest = self._count - self._most
        if oldest < 0:
            return
        done = [_done(oldest, place) for place in self._readers]
        try:
            store_messages.wait_for(self._store, done, max(0.001, until - time.monotonic()))
        except store_messages.StoreTimeout as error:
            late = [place for place in self._readers if _done(oldest, place) in error.keys]
            raise TimeoutError(f"places {late}, which read over the store, have not read message {oldest}") from error
        # A reader that leaves says so, and then that it is done with the message that it reads no more.
        if self._store.check(["left"]):
            gone = [place for place in self._readers if _left_at(self._store, f"left/{place}", oldest)]
            if gone:
                raise RuntimeError(f"places {gone}, which read over the store, have left the queue")

    def write(self, data: bytes | bytearray, until: float) -> None:
        if self._count >= self._most:
            store_messages.delete(self._store, [_done(self._count - self._most, place) for place in self._readers])
        store_messages.put(self._store, str(self._count), data)
        self._count += 1

    def close(self) -> None:
        _leave(self._store, "left for good", self._count, f"{self._count}/0")


class _StoreReader:
    """Place `place` of the `readers` that read over a store; the last to have read a message removes it."""

    def __init__(self, store: Any, place: int, readers: int, writer: int) -> None:
        self._store, self._place, self._readers, self._writer = store, place, readers, writer
        self._count = 0

    def wait_for_chunk(self, until: float) -> None:
        with self._naming():
            store_messages.wait_for(self._store, [f"{self._count}/0"], max(0.001, until - time.monotonic()))
        if _left_at(self._store, "left for good", self._count):
            raise RuntimeError(f"place {self._writer}, the writer, has left the queue")

    def read(self, until: float) -> bytearray:
        with self._naming():
            data, names = store_messages.take(self._store, str(self._count), max(0.001, until - time.monotonic()))
        read = f"{self._count}/read"
        if self._store.add(read, 1) == self._readers:
            store_messages.delete(self._store, [*names, read])
        self._store.set(_done(self._count, self._place), "")
        self._count += 1
        return data

    def close(self) -> None:
        _leave(self._store, f"left/{self._place}", self._count, "left", _done(self._count, self._place))

    @contextlib.contextmanager
    def _naming(self) -> Any:
        try:
            yield
        except store_messages.StoreTimeout as error:
            raise TimeoutError(
                f"place {self._writer}, the writer, has not written message {self._count} (read over the store)"
            ) from error


def _done(count: int, place: int) -> str:
    """Where `place` says that it has read message number `count`."""
    return f"{count}/done/{place}"


def _leave(store: Any, key: str, count: int, *then: str) -> None:
    """Say under `key` that this end takes part in message `count` no more, then wake who waits for one of `then`."""
    try:
        store.set(key, str(count))
        for other in then:
            store.set(other, "")
    except RuntimeError as error:  # the server ended first, and the other ends' wait with it
        logger.info("message queue: the other ends could not be told that this one is closed: %s", error)


def _left_at(store: Any, key: str, count: int) -> bool:
    """Has who leaves under `key` left before message `count`?"""
    return bool(store.check([key])) and int(store.get(key)) <= count


def _deadline(timeout: float | None) -> tuple[float, float]:
    seconds = envs.FVOPS_TIMEOUT_S if timeout is None else float(timeout)
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"timeout={timeout} must be a finite number of seconds, 0 or more")
    return seconds, time.monotonic() + seconds


def _describe(pg: Any) -> tuple[int, int, Any]:
    """This rank's place in `pg`, how many there are, and the store they share."""
    if isinstance(pg, StatelessProcessGroup):
        return pg.rank, pg.world_size, pg.store
    if not isinstance(pg, dist.ProcessGroup):
        raise TypeError(f"pg must be a ProcessGroup or a StatelessProcessGroup, got {type(pg).__name__}")
    if dist.get_backend(pg) in ("nccl", "hccl"):
        raise ValueError(f"a message queue needs a group for CPU tensors (gloo), got {dist.get_backend(pg)}")
    return dist.get_rank(pg), dist.get_world_size(pg), dist.distributed_c10d._get_default_store()


def _gather(pg: Any, places: int, obj: Any) -> list[Any]:
    if isinstance(pg, StatelessProcessGroup):
        return pg.all_gather_obj(obj)
    return [objects.broadcast([obj], dist.get_global_rank(pg, src), pg, objects.Wire())[0] for src in range(places)]


def _check_sizes(sizes: list[tuple[int, ...]], places: int) -> None:
    if len(set(sizes)) > 1:
        raise ValueError(
            f"ranks ask for different queues, (max_chunk_bytes, max_chunks, writer_rank) by place: {sizes}"
        )
    chunk_bytes, chunks, writer = sizes[0]
    if not 0 < chunk_bytes < 1 << 31 or chunks < 1 or not 0 <= writer < places:
        raise ValueError(
            f"max_chunk_bytes={chunk_bytes} (1 to 2**31 - 1), max_chunks={chunks} (1 or more) or "
            f"writer_rank={writer} (0 to {places - 1}) is out of range"
        )


def _identity() -> dict[str, int]:
    return asdict(own_identity()) if os.path.exists("/proc/self/stat") else {}


def _make(folder: str, nbytes: int) -> tuple[int, str, dict[str, Any]]:
    """Create the ring's file with all its memory, and what readers need to open it; or say why not."""
    refusal = futex.unsupported()
    if refusal:
        return -1, refusal, {}
    try:
        descriptor = unnamed_file.create(folder)
    except OSError as error:
        return -1, f"no file can be created in {folder}: {error}", {}
    try:
        # Touching memory that tmpfs has no room for would kill the process later.
        os.posix_fallocate(descriptor, 0, nbytes)
        return descriptor, "", asdict(unnamed_file.address_of(descriptor, folder))
    except OSError as error:
        os.close(descriptor)
        return -1, f"no file of {nbytes} bytes in {folder}: {error}", {}


def _open(
    address: unnamed_file.Address, folder: str, sizes: tuple[int, ...], place: int, places: int
) -> RingReader | None:
    """This reader's end, or None where it does not share memory (or processes) with the writer."""
    chunk_bytes, chunks, writer = sizes
    try:
        descriptor = unnamed_file.open_other(address, folder, ring_bytes(chunk_bytes, chunks, places - 1))
        try:
            ring = Ring(descriptor, chunk_bytes, chunks, places - 1)
        finally:
            os.close(descriptor)
        return RingReader(ring, place - (place > writer), Peer(address.maker), f"place {writer}, the writer,")
    except (OSError, RuntimeError) as error:
        logger.info("message queue: place %d reads over the store: %s", place, error)
        return None


def _writing_end(
    descriptor: int, sizes: tuple[int, ...], places: int, readers: list[int], offers: list[dict[str, Any]]
) -> RingWriter:
    chunk_bytes, chunks, writer_rank = sizes
    ring = Ring(descriptor, chunk_bytes, chunks, places - 1)
    peers = [Peer(Identity(**offers[reader]["identity"])) for reader in readers]
    lines = [reader - (reader > writer_rank) for reader in readers]
    return RingWriter(ring, peers, [f"place {reader}, a reader," for reader in readers], lines)
