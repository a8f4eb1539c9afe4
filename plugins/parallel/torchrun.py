"""Ranks that torchrun started: how they find the driver, and what they prove to each other.

torchrun's store can be read and written by whoever reaches its port, so it says one thing: the port at
which the driver listens. With a key that the user sets, ranks of several hosts meet at MASTER_ADDR. Without
one they meet on the loopback interface alone, and the key is in a file that only this user can read.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import torch.distributed as dist

from headway import ConfigError, RankError

from . import channel as wire
from .channel import Channel
from .handshake import Refused, Stranger, reach
from .messages import Hello, pack

KEY, KEY_FILE = "HEADWAY_KEY", "HEADWAY_KEY_FILE"
SHORTEST = 16  # bytes of a key
LOOPBACK = "127.0.0.1"
# In torchrun's store: the port, and the name of the key's file, or - for a user's key.
PLACE = "headway/driver"
_FILE = f"{KEY_FILE}, a file that only you can read"
SET_A_KEY = f"set {KEY} (or {_FILE}) to one secret on every host: openssl rand -hex 32"


def under_torchrun() -> bool:
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)


def users_key() -> bytes | None:
    """Raises ConfigError for a key that protects nothing."""
    if name := os.environ.get(KEY_FILE):
        try:
            with open(name, "rb") as file:
                if (mode := stat.S_IMODE(os.fstat(file.fileno()).st_mode)) & 0o077:
                    opened = f"{KEY_FILE}={name} may be read by others (mode {mode:o})"
                    raise ConfigError(f"{opened}: chmod 600 {name}")
                key = file.read(4096).strip()
        except OSError as error:
            raise ConfigError(f"{KEY_FILE}={name} cannot be read ({error.strerror}): {SET_A_KEY}") from None
        given = f"{KEY_FILE}={name}"
    elif KEY in os.environ:
        key, given = os.environb[KEY.encode()].strip(), KEY
    else:
        return None
    if len(key) < SHORTEST:
        raise ConfigError(f"{given} holds {len(key)} bytes: expected at least {SHORTEST}; {SET_A_KEY}")
    return key


def on_one_host() -> bool:
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]


def meeting_point() -> str:
    """Where the driver listens: nowhere that another host can reach, unless there are several hosts and a
    key."""
    return LOOPBACK if users_key() is None or on_one_host() else os.environ["MASTER_ADDR"]


def keep_to_loopback() -> None:
    """Has gloo and NCCL listen on the loopback interface alone, unless the user says where."""
    if loopback := next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None):
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback)


def private_file() -> Path:
    """A name that nobody has, in a folder that only this user can open."""
    return private_folder() / secrets.token_hex(16)


def private_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"headway-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        remedy = f"remove it, set TMPDIR, or {SET_A_KEY}"
        raise ConfigError(f"{folder} is not a folder that only you can open: {remedy}")
    return folder


@contextmanager
def shared_key() -> Iterator[tuple[bytes, str]]:
    """The driver's (key, what ranks are told of it). Its file, where there is one, lasts until the block
    ends."""
    if (key := users_key()) is not None:
        yield key, "-"
        return
    key, name = secrets.token_bytes(32), secrets.token_hex(16)
    file = private_folder() / name
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
        opened.write(key)
    try:
        yield key, name
    finally:
        file.unlink(missing_ok=True)


def open_door(port: int) -> socket.socket:
    host = meeting_point()
    try:
        return socket.create_server((host, port))
    except OSError as error:
        refused = f"parallel.port={port} cannot be opened at {host} ({error.strerror})"
        raise ConfigError(f"{refused}: set parallel.port=0 for any free one") from None


def announce(port: int, told: str) -> Any:
    """Says in torchrun's store where the driver listens. The answer is to be kept until the ranks have
    come."""
    store = _store(is_driver=True)
    store.set(PLACE, f"{port} {told}")
    return store


def _store(is_driver: bool) -> Any:
    """The store of torchrun's agent. Where something else set the environment, the driver's, beside its
    door."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        return next(dist.rendezvous("env://"))[0]  # type: ignore[attr-defined]  # torch exports it at run time
    host, port = meeting_point(), int(os.environ["MASTER_PORT"])
    listening = socket.create_server((host, port)).detach() if is_driver else None
    return dist.TCPStore(host, port, is_master=is_driver, wait_for_workers=False, master_listen_fd=listening)  # type: ignore[attr-defined]  # torch exports it at run time


def join(rank: int, facts: dict[str, str], patience: float) -> list[Channel]:
    """A rank's two connections to the driver: orders, store. Raises RankError or ConfigError."""
    try:
        told = _store(is_driver=False).get(PLACE)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise RankError(f"rank {rank}: rank 0 has not said where it listens: {reason}") from None
    found = re.fullmatch(rb"(\d{1,5}) (-|[0-9a-f]{32})", told)
    if found is None or not 0 < int(found[1]) < 65536:
        said = f"torchrun's store says {told[:60]!r} of rank 0"
        raise RankError(f"rank {rank}: {said}, which rank 0 has not written: somebody else writes there")
    port, name = int(found[1]), found[2].decode()
    key = _key(rank, name)
    limit = monotonic() + patience
    channels = []
    for purpose in ("orders", "store"):
        at = f"rank {rank}: rank 0 at {meeting_point()}:{port}"
        try:
            channel = reach(meeting_point(), port, key, limit)
        except (Stranger, Refused) as error:
            reason = f"{error}. It is somebody else, or its {KEY} differs"
            raise RankError(f"{at}: {reason}: {SET_A_KEY}") from None
        except (OSError, EOFError) as error:
            raise RankError(f"{at} lets nobody in within {patience:g} s: {error}") from None
        channel.send(wire.HELLO, pack(Hello(rank, socket.gethostname(), purpose, facts)))
        channels.append(channel)
    return channels


def _key(rank: int, name: str) -> bytes:
    if (key := users_key()) is not None:
        return key
    if name == "-":
        raise ConfigError(f"rank 0 has a key, rank {rank} on {socket.gethostname()} has none: {SET_A_KEY}")
    try:
        return (private_folder() / name).read_bytes()
    except OSError:
        missing = f"rank {rank} on {socket.gethostname()} finds no key of rank 0 here"
        alone = "Without a key ranks meet on one host, as one user"
        raise ConfigError(f"{missing}. {alone}; on several hosts {SET_A_KEY}") from None
