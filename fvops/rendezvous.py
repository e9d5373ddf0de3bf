"""The store that the ranks of a world meet in: torch's, but listening on the address given and on no other.

Torch's own rendezvous has rank 0 listen on all interfaces. Where rank 0 is to serve the store (``tcp://host:port``, and
``env://`` outside torchrun) it gets a socket bound to `host` instead. Torchrun's agent serves its own store, before
there is a rank; files need no socket. Those are left to torch.

Worlds at one port, one after another: a rank that begins anew before rank 0 has let go of the old server must not meet
there, which torch's rendezvous does, and hangs. So rank 0 puts a name of the world into its store, all keys are below
it, and no rank joins a world twice.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import secrets
import socket
import time
from datetime import timedelta
from typing import Any
from urllib.parse import urlparse

import torch
import torch.distributed as dist

from fvops import envs
from fvops.logger import init_logger

__all__ = ["listen", "start_torch_distributed"]

logger = init_logger(__name__)

# The key under which rank 0 says which world its store is for.
_WORLD = "fvops/world"
_AGAIN_S = 0.02
_LISTENING = "0A"  # in the kernel's tables of sockets


def start_torch_distributed(
    backend: str, init_method: str, world_size: int, rank: int, device_id: torch.device | None
) -> None:
    """``dist.init_process_group``, the store as above, every wait under ``FVOPS_TIMEOUT_S``. Collective.

    Raises:
        ValueError: `rank` is not in ``range(world_size)``, or torch finds fault with `init_method`.
        RuntimeError: rank 0 cannot listen there; or it cannot be reached, or a rank did not come, in time.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is not in a world of {world_size}")
    deadline = timedelta(seconds=envs.FVOPS_TIMEOUT_S)
    place = _served_by_rank_0(init_method)
    where: dict[str, Any] = {"init_method": init_method}
    if place is not None:
        where = {"store": _store(*place, rank, world_size, deadline)}
    dist.init_process_group(
        backend=backend,
        world_size=world_size,
        rank=rank,
        timeout=deadline,
        # torch takes accelerators here only; the groups' device may be the CPU all the same.
        device_id=None if device_id is None or device_id.type == "cpu" else device_id,
        **where,
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on ``host:port`` and on no other address.

    Raises:
        OSError: `host` is no address of this machine, or the port is taken.
    """
    found: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
        except OSError as error:
            listener.close()
            found = found or error
        else:
            return listener
    raise found or OSError(f"{host} has no address")


def _served_by_rank_0(init_method: str) -> tuple[str, int] | None:
    """Host and port of a store that rank 0 has to serve; None where torch's rendezvous does without, or will object."""
    parsed = urlparse(init_method)
    if parsed.scheme == "tcp" and parsed.hostname and parsed.port:
        return parsed.hostname, parsed.port
    if parsed.scheme == "env" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        if host and port.isdecimal() and 0 < int(port) < 65536:
            return host, int(port)
    return None


def _store(host: str, port: int, rank: int, world_size: int, deadline: timedelta) -> dist.Store:
    """The store at ``host:port``, which rank 0 serves, for this world's keys; returns when all ranks are there."""
    until = time.monotonic() + deadline.total_seconds()
    descriptor = _listening_descriptor(host, port) if rank == 0 else None
    missing = [] if rank == 0 else [0]
    try:
        store, world = _serve(descriptor, host, port, until) if rank == 0 else _find(host, port, rank, until)
        scoped = dist.PrefixStore(f"{_WORLD}/{world}", store)
        scoped.set(f"here/{rank}", "")
        for other in range(world_size):
            missing = [other]
            scoped.wait([f"here/{other}"], _left(until))
            missing = []
    except RuntimeError as error:
        who = f"rank {missing[0]} did not come" if missing else "the store broke"
        raise RuntimeError(
            f"the {world_size} ranks of the world did not meet at {host}:{port}, where rank 0 listens, within "
            f"{deadline.total_seconds():g} s: {who}, says rank {rank}. Torch says: {str(error).splitlines()[0]}"
        ) from error
    store.set_timeout(deadline)
    return scoped


def _serve(descriptor: int | None, host: str, port: int, until: float) -> tuple[dist.Store, str]:
    """A store that this process serves, and what tells the world that is being made from others at this port."""
    named = envs.FVOPS_STORE_LISTEN
    everywhere = named is not None and _is_number(named) and ipaddress.ip_address(named).is_unspecified
    own_host = host if named is None or everywhere else named
    # multi_tenant: a server that this process still has at the port goes on.
    store = dist.TCPStore(
        own_host, port, None, True, _left(until), False, multi_tenant=True, master_listen_fd=descriptor
    )
    world = secrets.token_hex(8)
    store.set(_WORLD, world)
    return store, world


def _find(host: str, port: int, rank: int, until: float) -> tuple[dist.Store, str]:
    """The store that rank 0 serves now. Where this rank has joined before, an earlier world is on its way out."""
    while True:
        store = dist.TCPStore(host, port, None, False, _left(until), False)
        why = "the server of an earlier world is still there, and no later one came"
        try:
            world = store.get(_WORLD).decode()
            if store.add(f"{_WORLD}/{world}/joined/{rank}", 1) == 1:
                return store, world
        except dist.DistNetworkError as error:  # it may have gone out, to make room for a later one
            why = f"the server answered no more: {error}"
        del store
        if time.monotonic() + _AGAIN_S > until:
            raise RuntimeError(why)
        time.sleep(_AGAIN_S)


def _left(until: float) -> timedelta:
    """Until the deadline; torch takes 0 for no deadline."""
    return timedelta(seconds=max(0.01, until - time.monotonic()))


def _listening_descriptor(host: str, port: int) -> int | None:
    """A descriptor for the store, which closes it; None where this process serves a store at that port already."""
    address = envs.FVOPS_STORE_LISTEN or host
    try:
        listener = listen(address, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE and _is_served_here(port):
            return None
        raise RuntimeError(
            f"rank 0 cannot listen on {address}:{port}, which must be an address of its machine and a free port: "
            f"{error}. Where the other ranks know it by another address, FVOPS_STORE_LISTEN names the one to listen on"
        ) from error
    if not envs.FVOPS_STORE_LISTEN and host != "localhost" and not _is_number(host) and _is_loopback(listener):
        logger.warning(
            "rank 0 listens on %s only, for that is what %s is on this machine: ranks of other machines cannot come. "
            "If there are any, set FVOPS_STORE_LISTEN to this machine's address in their network",
            listener.getsockname()[0],
            host,
        )
    return listener.detach()


def _is_served_here(port: int) -> bool:
    """Does this process have a socket that listens at `port`: a store's server that is in use still?"""
    listening = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        with contextlib.suppress(FileNotFoundError), open(table) as lines:  # no table of IPv6 where there is none
            for line in list(lines)[1:]:
                _, local, _, state, *_, inode = line.split()[:10]
                if state == _LISTENING and int(local.rpartition(":")[2], 16) == port:
                    listening.add(f"socket:[{inode}]")
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile, as the folder's own is
            if os.readlink(f"/proc/self/fd/{descriptor}") in listening:
                return True
    return False


def _is_number(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return False


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback
