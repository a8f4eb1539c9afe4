"""Where a rank that the driver started begins: `python -m plugins.parallel.start RANK ORDERS STORE DRIVER`.

ORDERS and STORE are file descriptors of sockets that the driver made and this process inherits, so nothing
listens and nobody else can speak on them. The rank beats before it imports torch: from its first lines on
it ends when the driver ends, whatever it is doing, and the driver sees when it stops.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

from headway import HeadwayError

from . import channel as wire
from .channel import Channel
from .messages import Raised, pack, pack_beat

BEAT_SECONDS = 0.5
LONGEST = 50_000  # characters of a reason
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def leave_signals_to_the_driver() -> None:
    """They reach the driver too, who ends us; and without the driver we end by ourselves."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


class Pulse:
    """Tells the driver that this rank lives and how far it is, which is how one that hangs is found. Ends
    the process when the driver is gone: its connection closes, or `parent`, where given, is no longer our
    parent."""

    def __init__(self, channel: Channel, parent: int | None = None) -> None:
        self.progress: Callable[[], tuple[int, int]] = lambda: (0, 0)  # (steps, collectives) begun
        self._channel, self._parent = channel, parent
        threading.Thread(target=self._beat, daemon=True, name="pulse").start()

    def _beat(self) -> None:
        while self._parent in (None, os.getppid()):
            try:
                self._channel.send(wire.BEAT, pack_beat(*self.progress()))
            except OSError:
                break
            threading.Event().wait(BEAT_SECONDS)
        os._exit(1)


def report_error(channel: Channel, rank: int, error: BaseException, secondary: bool = False) -> None:
    """Tells the driver why this rank ends."""
    text = str(error)
    if not isinstance(error, HeadwayError):
        text = f"{type(error).__name__}: {text}\n{traceback.format_exc()}"
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]}\n...\n{text[-LONGEST // 2 :]}"
    try:
        channel.send(wire.RAISED, pack(Raised(f"raised {text}", secondary)))
    except OSError:
        print(f"rank {rank}: {text}", file=sys.stderr)


def main() -> int:
    leave_signals_to_the_driver()
    rank, orders, store, driver = map(int, sys.argv[1:])
    channel, other = (Channel(socket.socket(fileno=number)) for number in (orders, store))
    for number in (orders, store):
        os.set_inheritable(number, False)
    pulse = Pulse(channel, driver)
    try:
        from .worker import Worker  # imports torch
    except BaseException as error:
        report_error(channel, rank, error)
        return 1
    return Worker(rank, rank, channel, other, pulse).serve()


def end(code: int) -> NoReturn:
    """A communicator or a CUDA context that waits for a dead rank must not keep the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end(main())
