"""Ctrl-C, SIGTERM and SIGHUP end a run alike: between two steps, and never while its results are written."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
PATIENCE = 2.0  # seconds that a step may take to come back before it is interrupted where it stands


class Moment(Enum):
    """What a signal does now."""

    ANYWHERE = auto()  # composing, building, loading: nothing is lost, so each is raised at once
    STEPPING = auto()  # the first one waits for the end of the step, so that every request is accounted for
    HELD = auto()  # results are being written: it is noted, and raised by nobody
    OVER = auto()  # all is written: it ends the process, whatever still cleans up


class Interrupts:
    """The signals of this process, which has one set of them; `interrupts` is the only object."""

    def __init__(self) -> None:
        self.received = 0  # the first signal that came
        self._moment = Moment.ANYWHERE
        self._code = 0
        self._timed = False  # whether a step is being waited for
        self._terminals: list[int] = []

    def install(self) -> None:
        """What the parent ignores (nohup, a shell's background job) stays ignored."""
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        if hasattr(signal, "SIGALRM"):
            signal.signal(signal.SIGALRM, self._lose_patience)
        atexit.register(self._ignore)  # registered first, so called last

    @property
    def exit_code(self) -> int:
        """As shells have it: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + (self.received or signal.SIGINT)

    def check(self) -> None:
        """Between two steps. Raises KeyboardInterrupt once a signal has come."""
        if self.received:
            raise KeyboardInterrupt

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Around the loop of a run; from its end on signals are held. A loop in a loop changes nothing."""
        before, self._moment = self._moment, Moment.STEPPING
        self.check()
        try:
            yield
        finally:
            if before is not Moment.STEPPING:
                self.hold()

    @contextmanager
    def sleeping(self) -> Iterator[None]:
        """Around a sleep between two steps: nothing is lost by a signal, so it is raised at once."""
        before = self._moment
        if before is Moment.STEPPING:
            self._moment = Moment.ANYWHERE
            self.check()
        try:
            yield
        finally:
            self._moment = before

    def hold(self) -> None:
        """From here on what was done is written, whatever comes."""
        self._moment = Moment.HELD
        if self._timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._timed = False

    def release(self) -> None:
        """What was done is written. Raises KeyboardInterrupt for a signal that came meanwhile."""
        self._moment = Moment.ANYWHERE
        self.check()

    def over(self, code: int) -> int:
        """All is written, and `code` is the exit code, also where a signal cuts the clean-up short."""
        self._code, self._moment = code, Moment.OVER
        return code

    @staticmethod
    def caused(error: BaseException) -> bool:
        """Whether it is a KeyboardInterrupt, or what a library has made of one raised in its callback."""
        seen: BaseException | None = error
        while seen is not None and not isinstance(seen, KeyboardInterrupt):
            seen = seen.__cause__ or seen.__context__
        return seen is not None

    def _ignore(self) -> None:
        """The interpreter removes handlers before it ends, and a signal would then change the exit code."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._moment is Moment.OVER:
            os._exit(self._code)
        first, self.received = not self.received, self.received or number
        if number == getattr(signal, "SIGHUP", None):
            self._leave_terminals()
        if self._moment is Moment.STEPPING and first and hasattr(signal, "setitimer"):
            self._timed = True
            signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        elif self._moment is not Moment.HELD:
            if self._moment is Moment.STEPPING:
                self._moment = Moment.HELD
            raise KeyboardInterrupt

    def _lose_patience(self, number: int, frame: FrameType | None) -> None:
        if self._moment is Moment.STEPPING:
            self._moment = Moment.HELD
            raise KeyboardInterrupt

    def _leave_terminals(self) -> None:
        """A closed terminal refuses every write, and a line that nobody reads must not cost the results."""
        for fd in self._terminals:
            try:
                os.write(fd, b"")
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


interrupts = Interrupts()


def say(text: str, *, error: bool = False) -> None:
    """Prints a line. Its reader may be gone (`| head`, a closed terminal): then the rest goes nowhere."""
    stream = sys.stderr if error else sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
