"""Where ranks leave the addresses of their collectives for each other: a torch Store in the driver's memory.

A rank reads and writes it over a second connection to the driver. torch's own TCPStore serves anybody who
reaches its port, and hands what it holds to gloo and NCCL as it is.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from datetime import timedelta
from time import monotonic

import torch.distributed as dist

from . import channel as wire
from .channel import Channel, Malformed
from .messages import pack_parts, unpack_parts

_NUMBER = struct.Struct("<q")
_SECONDS = struct.Struct("<d")
LONGEST = 86400.0  # seconds that a request may wait
LATE, DONE = b"late", b"done"


class Shelf:
    """What the store holds, in the driver. Any thread may ask."""

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}
        self._changed = threading.Condition()
        self._closed = False

    def close(self) -> None:
        """Whoever waits for a key is told that it does not come."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def ask(self, operation: str, seconds: float, args: list[bytes]) -> list[bytes]:
        """[DONE, result] or [LATE]. seconds: how long `get` and `wait` wait for their keys."""
        with self._changed:
            if operation in ("get", "wait") and not self._arrive(args, seconds):
                return [LATE]
            result = self._do(operation, args)
            self._changed.notify_all()
        return [DONE, result]

    def _arrive(self, keys: list[bytes], seconds: float) -> bool:
        until = monotonic() + seconds
        while not all(key in self._values for key in keys):
            if self._closed or not self._changed.wait(max(0.0, until - monotonic())):
                return False
        return True

    def _do(self, operation: str, args: list[bytes]) -> bytes:
        values = self._values
        match operation, args:
            case "set", [key, value]:
                values[key] = value
            case "get", [key]:
                return values[key]
            case "add", [key, amount]:
                total = int(values.get(key, b"0")) + _number(amount)
                values[key] = str(total).encode()  # text, as torch's stores hold it
                return values[key]
            case "check", keys:
                return b"1" if all(key in values for key in keys) else b""
            case "wait", _:
                pass
            case "delete", [key]:
                return b"1" if values.pop(key, None) is not None else b""
            case "compare_set", [key, expected, desired]:
                if values.get(key, b"") == expected:
                    values[key] = desired
                return values.get(key, expected)
            case _:
                raise Malformed(f"the store cannot {operation!r} with {len(args)} arguments")
        return b""


def _number(packed: bytes) -> int:
    if len(packed) != _NUMBER.size:
        raise Malformed(f"no number: {len(packed)} bytes")
    return int(_NUMBER.unpack(packed)[0])


class Store(dist.Store):  # type: ignore[name-defined]  # torch exports it at run time
    """Either end of a Shelf, as torch wants it. Must be kept as long as a process group uses it."""

    def __init__(self, ask: Callable[[str, float, list[bytes]], list[bytes]]) -> None:
        super().__init__()
        self._asked = ask

    def _ask(self, operation: str, *args: bytes, timeout: timedelta | None = None) -> bytes:
        seconds = (self.timeout if timeout is None else timeout).total_seconds()
        answer = self._asked(operation, seconds, list(args))
        if answer[0] == LATE:
            raise dist.DistStoreError(f"waited {seconds:g} s for another rank")
        return answer[1]

    def set(self, key: str, value: bytes | str) -> None:
        self._ask("set", key.encode(), value.encode() if isinstance(value, str) else value)

    def get(self, key: str) -> bytes:
        return self._ask("get", key.encode())

    def add(self, key: str, amount: int) -> int:
        return int(self._ask("add", key.encode(), _NUMBER.pack(amount)))

    def check(self, keys: list[str]) -> bool:
        return bool(self._ask("check", *(key.encode() for key in keys)))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._ask("wait", *(key.encode() for key in keys), timeout=timeout)

    def delete_key(self, key: str) -> bool:
        return bool(self._ask("delete", key.encode()))

    def compare_set(self, key: str, expected: bytes | str, desired: bytes | str) -> bytes:
        values = [value.encode() if isinstance(value, str) else value for value in (expected, desired)]
        return self._ask("compare_set", key.encode(), *values)

    def clone(self) -> Store:
        return self


def over(channel: Channel) -> Store:
    """A rank's end."""
    lock = threading.Lock()

    def ask(operation: str, seconds: float, args: list[bytes]) -> list[bytes]:
        try:
            with lock:
                wait = _SECONDS.pack(min(seconds, LONGEST))
                channel.send(wire.ASK, pack_parts([operation.encode(), wait, *args]))
                _, body = channel.receive()
        except (OSError, EOFError) as error:
            raise dist.DistStoreError("the driver is gone") from error
        return unpack_parts(body)

    return Store(ask)


def serve(channel: Channel, shelf: Shelf) -> None:
    """The driver's side of a rank's connection, until that ends. Raises Malformed for what is no request."""
    try:
        while True:
            kind, body = channel.receive()
            parts = unpack_parts(body)
            if kind != wire.ASK or len(parts) < 2 or len(parts[1]) != _SECONDS.size:
                raise Malformed(f"a message of kind {kind!r} and {len(body)} bytes: no request of the store")
            operation, seconds = parts[0].decode(errors="replace"), _SECONDS.unpack(parts[1])[0]
            if not 0 <= seconds <= LONGEST:
                raise Malformed(f"a request of the store that waits {seconds} s")
            channel.send(wire.FOUND, pack_parts(shelf.ask(operation, seconds, parts[2:])))
    except (OSError, EOFError):
        pass
