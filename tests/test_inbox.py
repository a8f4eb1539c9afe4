"""A server's side of the engine: other threads post and abort, and the loop sleeps until there is something
to do."""

from __future__ import annotations

import signal
import time
from queue import Queue
from threading import Event, Thread, get_ident, main_thread

import pytest
from helpers.scripted import ask, engine, everybody

from core.clock import WallClock
from core.engine import Engine
from core.inbox import Inbox
from core.inputs import Arrival
from core.interrupts import Interrupts
from core.outputs import RunResult
from core.outside import Observer
from core.testing.oracle import OracleExecutor

LIMIT = 20.0  # seconds after which a test gives up; none waits that long when all is well


class Answers(Observer):
    """Hands every ended request to whoever asked."""

    def __init__(self) -> None:
        self.ended: Queue = Queue()

    def on_requests(self, finished) -> None:
        for request in finished:
            self.ended.put((request.id, request.state.value))


class Served:
    """An engine that runs in a thread of its own, on the real clock, until it is closed."""

    def __init__(self, *arrivals: Arrival, **limits) -> None:
        executor = OracleExecutor(num_blocks=16, step_seconds=0.0)
        executor.clock = WallClock()
        self.answers = Answers()
        self.engine: Engine = engine(everybody, executor=executor, observers=[self.answers], **limits)
        self.turns, self.sleeps = 0, Queue()
        self._count()
        self.engine.inbox.open()
        self._result: list[RunResult] = []
        self._thread = Thread(
            target=lambda: self._result.append(self.engine.run(list(arrivals))), daemon=True
        )
        self._thread.start()

    def _count(self) -> None:
        step, sleep = self.engine.step, self.engine.inbox.sleep

        def turn() -> bool:
            self.turns += 1
            return step()

        def asleep(seconds: float | None) -> None:
            self.sleeps.put(seconds)
            sleep(seconds)

        self.engine.step = turn  # type: ignore[method-assign]
        self.engine.inbox.sleep = asleep  # type: ignore[method-assign]

    def asleep(self) -> float | None:
        """How long it means to sleep, once it does."""
        return self.sleeps.get(timeout=LIMIT)

    def ended(self) -> tuple[str, str]:
        return self.answers.ended.get(timeout=LIMIT)

    def close(self) -> RunResult:
        self.engine.inbox.close()
        self._thread.join(LIMIT)
        assert not self._thread.is_alive()
        return self._result[0]


@pytest.mark.parametrize("depth", [1, 2])
def test_arrivals_from_another_thread_are_served_while_the_run_goes_on(depth: int) -> None:
    server = Served(max_inflight=depth)
    for i in range(4):
        server.engine.add(ask(5, 3, id=f"a{i}"))
        assert server.ended() == (f"a{i}", "finished")
    result = server.close()
    assert result.status == "finished" and [o.id for o in result.outputs] == ["a0", "a1", "a2", "a3"]


def test_nobody_polls() -> None:
    """While nothing is to do the loop does not turn: it sleeps once, without end, and wakes for what is
    posted."""
    server = Served()
    assert server.asleep() is None
    turns = server.turns
    server.engine.add(ask(5, 1, id="a"))
    server.ended()
    assert server.asleep() is None  # again, and nothing was done in between but to serve it
    assert server.turns - turns <= 3 and server.sleeps.empty()
    server.close()


def test_a_post_ends_the_sleep_until_a_later_arrival() -> None:
    server = Served(ask(5, 1, time=1000.0, id="late"))
    assert server.asleep() > 900
    server.engine.add(ask(5, 2, id="now"))
    assert server.ended() == ("now", "finished")
    assert server.asleep() > 900
    server.engine.abort("late")
    server.engine.arrivals.clear()  # asleep, it reads nothing
    server.close()


def test_an_abort_wakes_the_loop() -> None:
    """A request that waits for a time of its policy's choosing ends at once."""
    server = Served()
    server.asleep()

    def script(step, view) -> None:
        step.wake_at(view.now + 500.0)

    server.engine.roles.scheduler.script = script
    server.engine.add(ask(5, 3, id="a"))
    while (seconds := server.asleep()) is None:
        pass
    assert seconds > 400
    server.engine.abort("a")
    assert server.ended() == ("a", "aborted")
    assert server.close().outputs[0].state == "aborted"


def test_many_threads_post_and_nothing_is_lost() -> None:
    server = Served()
    threads = [
        Thread(target=lambda t=t: [server.engine.add(ask(4, 2, id=f"{t}.{i}")) for i in range(25)])
        for t in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert {server.ended() for _ in range(100)} == {
        (f"{t}.{i}", "finished") for t in range(4) for i in range(25)
    }
    assert server.close().status == "finished"


def test_in_virtual_time_a_post_is_looked_at_before_time_goes_on() -> None:
    executor = OracleExecutor(num_blocks=16)
    running = engine(everybody, executor=executor)
    running.inbox.open()
    done = []
    thread = Thread(target=lambda: done.append(running.run([])), daemon=True)
    thread.start()
    running.add(ask(5, 2, id="a"))
    running.inbox.close()
    thread.join(LIMIT)
    assert [o.state for o in done[0].outputs] == ["finished"] and done[0].duration == pytest.approx(0.02)


def test_what_is_posted_before_a_run_is_in_it() -> None:
    running = engine(everybody)
    running.add(ask(5, 2, id="a"))
    assert [o.id for o in running.run([ask(5, 2, id="b")]).outputs] == ["a", "b"]
    assert not len(running.arrivals)


def test_a_run_that_is_cut_off_forgets_what_was_posted() -> None:
    running = engine(lambda step, view: 1 / 0)
    running.add(ask(5, 2, id="a"))
    with pytest.raises(Exception, match="ZeroDivisionError"):
        running.run([])
    running.add(ask(5, 2, id="b"))
    running.roles.scheduler.script = everybody
    assert [o.id for o in running.run([]).outputs] == ["b"]


# ---- the sleep itself ------------------------------------------------------------------------------------


def test_a_sleep_ends_at_its_time_and_at_once_when_something_is_there() -> None:
    inbox, clock = Inbox(), WallClock()
    clock.wait_until(clock.now() + 0.02, inbox)
    assert clock.now() >= 0.02
    inbox.post(ask(5, 1, id="a"))
    inbox.sleep(LIMIT)
    inbox.sleep(None)
    assert [arrival.id for arrival in inbox.take()] == ["a"] and clock.now() < LIMIT


def test_a_signal_is_felt_during_a_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the loop of a run the first one waits for the end of a step; asleep there is none to wait for."""
    assert get_ident() == main_thread().ident
    mine, inbox = Interrupts(), Inbox()
    monkeypatch.setattr("core.inbox.interrupts", mine)
    # patience with a step, which is not tested here
    monkeypatch.setattr(signal, "setitimer", lambda *_: None)
    before = signal.signal(signal.SIGINT, mine._handle)
    asleep, felt = Event(), Event()

    def send() -> None:
        """Again, if it came just before the sleep: Python looks at a signal between two instructions."""
        asleep.wait(LIMIT)
        while not felt.wait(0.2):
            signal.pthread_kill(main_thread().ident, signal.SIGINT)

    sender = Thread(target=send)
    sender.start()
    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt), mine.stepping():
        asleep.set()
        inbox.sleep(LIMIT)
    felt.set()
    sender.join(LIMIT)
    signal.signal(signal.SIGINT, before)
    assert time.perf_counter() - began < LIMIT / 2
