"""Who is let in where the driver listens: ranks that torchrun started, and nobody else.

Driver and rank share a key. Each sends 32 fresh random bytes and proves with an HMAC over both that it
knows the key, before the other reads anything else of it. Who speaks is part of what is authenticated, so a
proof that is sent back proves nothing; and so is the address at which the rank found the driver, so nobody
in between can pass proofs on.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
import threading
from queue import SimpleQueue
from time import monotonic

from . import channel as wire
from .channel import Channel, Malformed, exactly
from .messages import Hello, unpack

NONCE = PROOF = 32  # bytes
PATIENCE = 10.0  # seconds that a connection may take to prove itself
ENTERING = 64  # connections that may be doing so at once; one more ends the oldest
REFUSALS = 5  # connections of a rank that end when it has given its proof: so its key is another


class Stranger(ConnectionError):
    """The other end does not know the key."""


class Refused(ConnectionError):
    """The other end hangs up on our proof: it knows another key, or has too many strangers to deal with."""


def admit(connection: socket.socket, key: bytes, limit: float) -> None:
    """The driver's part. Raises Stranger, OSError or EOFError; returns when both have proved the key."""
    ours = secrets.token_bytes(NONCE)
    connection.settimeout(max(0.01, limit - monotonic()))
    connection.sendall(ours)
    reply = exactly(connection, NONCE + PROOF, limit)
    theirs, proof = reply[:NONCE], reply[NONCE:]
    at = _address(connection.getsockname())
    if not hmac.compare_digest(proof, _proof(key, b"rank", ours, theirs, at=at)):
        raise Stranger("whoever connected does not know the key")
    connection.sendall(_proof(key, b"driver", ours, theirs, at=at))


def prove(connection: socket.socket, key: bytes, limit: float) -> None:
    """The rank's part."""
    theirs, ours = exactly(connection, NONCE, limit), secrets.token_bytes(NONCE)
    at = _address(connection.getpeername())
    connection.sendall(ours + _proof(key, b"rank", theirs, ours, at=at))
    try:
        proof = exactly(connection, PROOF, limit)
    except (EOFError, ConnectionError):
        raise Refused("whoever answered does not take our proof") from None
    if not hmac.compare_digest(proof, _proof(key, b"driver", theirs, ours, at=at)):
        raise Stranger("whoever answered does not know the key")


def _proof(key: bytes, role: bytes, drivers: bytes, ranks: bytes, at: bytes) -> bytes:
    return hmac.digest(key, b"headway 1 %-6b" % role + drivers + ranks + at, "sha256")


def _address(name: tuple[str, int]) -> bytes:
    ip = ipaddress.ip_address(name[0].partition("%")[0])
    return f"{getattr(ip, 'ipv4_mapped', None) or ip} {name[1]}".encode()


class Door:
    """The driver's listening socket. Each connection has its own thread until it is known: none holds up
    another."""

    def __init__(self, server: socket.socket, key: bytes) -> None:
        self.met: SimpleQueue[tuple[Hello, Channel]] = SimpleQueue()
        self.strangers = 0  # connections that did not prove the key
        self.port: int = server.getsockname()[1]
        self._server, self._key, self._open = server, key, True
        self._entering: dict[socket.socket, None] = {}  # oldest first
        self._lock = threading.Lock()
        server.settimeout(0.2)
        self._listener = threading.Thread(target=self._listen, daemon=True, name="door")
        self._listener.start()

    def close(self) -> None:
        self._open = False
        self._listener.join()
        self._server.close()
        with self._lock:
            for connection in self._entering:
                _shut(connection)

    def _listen(self) -> None:
        while self._open:
            try:
                connection, _ = self._server.accept()
            except TimeoutError:
                continue
            except OSError:  # no file descriptor is left for it; those that are slow give theirs back
                threading.Event().wait(0.1)
                continue
            with self._lock:
                if len(self._entering) >= ENTERING:
                    _shut(next(iter(self._entering)))
                self._entering[connection] = None
            threading.Thread(target=self._enter, args=(connection,), daemon=True).start()

    def _enter(self, connection: socket.socket) -> None:
        limit = monotonic() + PATIENCE
        try:
            admit(connection, self._key, limit)
            kind, body = wire.receive(connection, limit)
            if kind != wire.HELLO:
                raise Malformed(f"a message of kind {kind!r}: expected {wire.HELLO!r}")
            hello = unpack(Hello, body)
        except (OSError, EOFError, Malformed):
            self.strangers += 1
            connection.close()
        else:
            self.met.put((hello, Channel(connection)))
        finally:
            with self._lock:
                self._entering.pop(connection, None)


def _shut(connection: socket.socket) -> None:
    """Wakes the thread that reads from it, which then closes it."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def reach(host: str, port: int, key: bytes, limit: float) -> Channel:
    """A rank's connection to the driver. Raises Stranger or Refused when somebody else answers, or the
    driver with another key, OSError or EOFError when nobody lets us in until `limit` (time.monotonic)."""
    refusals = 0
    while True:
        try:
            return _try(host, port, key, limit)
        except Refused:
            if (refusals := refusals + 1) == REFUSALS or monotonic() > limit:
                raise
        except Stranger:
            raise
        except (OSError, EOFError):
            if monotonic() > limit:
                raise
        threading.Event().wait(0.1)


def _try(host: str, port: int, key: bytes, limit: float) -> Channel:
    patience = max(0.1, min(PATIENCE, limit - monotonic()))
    connection = socket.create_connection((host, port), timeout=patience)
    try:
        prove(connection, key, min(limit, monotonic() + PATIENCE))
    except BaseException:
        connection.close()
        raise
    return Channel(connection)
