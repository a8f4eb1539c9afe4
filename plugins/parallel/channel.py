"""One connection between the driver and a rank. A message is a kind (one byte), a size (four) and a body;
`messages.py` says what bodies hold.

Activations and weights never pass here, those are collectives' business. The plan of a step does: a few
integers and the int32 buffer that the batcher made, sent once to each rank.
"""

from __future__ import annotations

import socket
import struct
from threading import Lock
from time import monotonic

# driver -> rank
JOB, STEP, CALL, QUIT, REFUSED, FOUND = b"J", b"S", b"C", b"Q", b"X", b"F"
# rank -> driver
HELLO, ANSWER, RESULT, RAISED, BEAT, ASK = b"H", b"A", b"R", b"E", b"B", b"K"

#: The largest body of each kind, in bytes. A step's buffer and results grow with the engine's limits.
LARGEST = {
    JOB: 1 << 20, STEP: 1 << 28, CALL: 1 << 16, QUIT: 0, REFUSED: 1 << 20, FOUND: 1 << 24,
    HELLO: 1 << 16, ANSWER: 1 << 16, RESULT: 1 << 28, RAISED: 1 << 20, BEAT: 16, ASK: 1 << 24,
}  # fmt: skip

_HEAD = struct.Struct("<cI")
_AT_ONCE = 1 << 20  # bytes of a body for which memory is taken before they arrive


class Malformed(ValueError):
    """What the other end sent is no message. Says what is wrong with it; who receives it adds who sent it."""


class Channel:
    """Any thread may send; one thread receives. A closed connection is an EOFError or OSError."""

    def __init__(self, connection: socket.socket) -> None:
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(None)
        self._socket, self._lock = connection, Lock()

    def send(self, kind: bytes, body: bytes = b"") -> None:
        with self._lock:
            self._socket.sendall(_HEAD.pack(kind, len(body)) + body)

    def receive(self) -> tuple[bytes, bytes]:
        return receive(self._socket)

    def close(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that receives
        except OSError:
            pass
        self._socket.close()


def receive(connection: socket.socket, limit: float | None = None) -> tuple[bytes, bytes]:
    """(kind, body) of the next message, until `limit` (time.monotonic). Raises Malformed before it takes
    memory for a body."""
    kind, size = _HEAD.unpack(exactly(connection, _HEAD.size, limit))
    if kind not in LARGEST:
        raise Malformed(f"a message of kind {kind!r}: expected one of {b' '.join(LARGEST).decode()}")
    if size > LARGEST[kind]:
        raise Malformed(f"a message of kind {kind!r} and {size:,} bytes: expected at most {LARGEST[kind]:,}")
    return kind, exactly(connection, size, limit)


def exactly(connection: socket.socket, size: int, limit: float | None = None) -> bytes:
    """So many bytes. Raises TimeoutError at `limit`, however slowly they come, and EOFError at the end."""
    found = bytearray()
    while len(found) < size:
        if limit is not None:
            if (left := limit - monotonic()) <= 0:
                raise TimeoutError("the other end says nothing")
            connection.settimeout(left)
        part = connection.recv(min(size - len(found), _AT_ONCE))
        if not part:
            raise EOFError("the connection was closed")
        found += part
    return bytes(found)
