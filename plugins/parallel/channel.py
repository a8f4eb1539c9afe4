"""What the driver and a rank say to each other: length-prefixed messages over one TCP connection a rank.

Activations and weights never pass here, those are collectives' business. The plan of a step does: a few integers and the int32
buffer that the batcher made, sent once to each rank.
"""

from __future__ import annotations

import hmac
import pickle
import socket
import struct
from dataclasses import fields
from threading import Lock
from typing import Any

import numpy as np

from ..executors.torch.batch import StepInput

# driver -> rank
STEP, CALL, QUIT, REFUSED = b"S", b"C", b"Q", b"X"
# rank -> driver
HELLO, ANSWER, RESULT, RAISED, BEAT = b"H", b"A", b"R", b"E", b"B"

_HEAD = struct.Struct("=cI")
_NUMBERS = [f.name for f in fields(StepInput) if f.name not in ("data", "sampled")]  # ints and bools, in the order of the class
_STEP = struct.Struct(f"={len(_NUMBERS)}i")


class Channel:
    """One connection. Any thread may send; one thread receives. A closed connection is an EOFError or OSError."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(None)
        self._socket, self._lock = connection, Lock()

    @classmethod
    def connect(cls, host: str, port: int, key: bytes) -> Channel:
        connection = socket.create_connection((host, port), timeout=30)
        connection.sendall(key)
        return cls(connection)

    @classmethod
    def accept(cls, server: socket.socket, key: bytes) -> Channel | None:
        """The next rank that knows the key; None when none came within the server's timeout."""
        try:
            connection, _ = server.accept()
        except TimeoutError:
            return None
        connection.settimeout(10)
        if hmac.compare_digest(_exactly(connection, len(key)), key):
            return cls(connection)
        connection.close()
        return None

    def send(self, kind: bytes, body: bytes = b"") -> None:
        with self._lock:
            self._socket.sendall(_HEAD.pack(kind, len(body)) + body)

    def receive(self) -> tuple[bytes, bytes]:
        kind, size = _HEAD.unpack(_exactly(self._socket, _HEAD.size))
        return kind, _exactly(self._socket, size)

    def close(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that receives
        except OSError:
            pass
        self._socket.close()


def _exactly(connection: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        part = connection.recv(size - len(found))
        if not part:
            raise EOFError("the connection was closed")
        found += part
    return bytes(found)


def pack(thing: Any) -> bytes:
    return pickle.dumps(thing, protocol=pickle.HIGHEST_PROTOCOL)


unpack = pickle.loads


def pack_step(step: StepInput) -> bytes:
    """44 bytes and the buffer. Which plan indices sample stays with the driver: only it tells requests apart."""
    return _STEP.pack(*[getattr(step, name) for name in _NUMBERS]) + step.data.tobytes()


def unpack_step(body: bytes) -> StepInput:
    numbers = dict(zip(_NUMBERS, _STEP.unpack_from(body), strict=True))
    return StepInput(data=np.frombuffer(body, dtype=np.int32, offset=_STEP.size), sampled=None, **numbers)
