"""The loop: depth, arrivals, endings, interrupts, observers, callbacks, roles, decisions and clocks."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from helpers.scripted import Scripted, ask, engine, everybody

from core.clock import RecordingClock, ReplayClock, VirtualClock
from core.compose.config import EngineConfig
from core.engine import Engine
from core.errors import ConfigError, InvariantError
from core.inputs import Arrival, SamplingParams
from core.outputs import TextStop
from core.outside import Observer
from core.policy import Order, Retention, Role, Scheduler
from core.testing.oracle import OracleExecutor, WrongKV


def tokens_of(running: Engine, output) -> list[int]:
    """What the request must have got, whatever happened on the way."""
    n = output.num_prompt_tokens
    return [running.executor.token(output.id, p) for p in range(n, n + len(output.output_token_ids))]


# ---- the loop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_inflight", [1, 2, 3])
@pytest.mark.parametrize("placeholders", [True, False])
def test_depth_changes_no_token(max_inflight: int, placeholders: bool) -> None:
    running = engine(
        max_inflight=max_inflight, executor=OracleExecutor(num_blocks=16, eos=True, placeholders=placeholders)
    )
    result = running.run([ask([i % 5, 1, 2, 3], 12, time=0.005 * i) for i in range(6)])
    for output in result.outputs:
        assert output.output_token_ids == tokens_of(running, output)
        assert (output.output_token_ids[-1] == 0) == (output.finish_reason == "stop")
        assert 0 not in output.output_token_ids[:-1]


def test_depth_hides_the_host_behind_the_device() -> None:
    lags = []

    def script(step, view):
        lags.append(view.lag)
        everybody(step, view)

    engine(script, max_inflight=2).run([ask(4, 6)])
    assert max(lags) == 1
    with pytest.raises(ConfigError, match="takes at most 4 plans in flight"):
        engine(max_inflight=5)


def test_endings_by_length_by_hidden_length_by_stop_token_and_by_context() -> None:
    running = engine(num_blocks=17, executor=OracleExecutor(num_blocks=17))
    token = running.executor.token
    running_token = next(p for p in range(4, 20) if token("stops", p) == 2)
    stops = Arrival(0.0, [1] * 4, SamplingParams(max_tokens=40, stop_token_ids=(2,)), id="stops")
    result = running.run(
        [ask(4, 3), ask(4, 30, output_len=5), stops, Arrival(0.0, [1] * 60, SamplingParams(max_tokens=None))]
    )
    assert [(o.finish_reason, len(o.output_token_ids)) for o in result.outputs] == [
        ("length", 3),
        ("stop", 5),
        ("stop", running_token - 3),
        ("length", 4),
    ]


def test_a_stop_string_is_decided_from_outside() -> None:
    stop = SamplingParams(max_tokens=20, stop=("x",))
    roles = dict(engine().roles.given)
    roles["executor"] = OracleExecutor()
    found = TextStop("the answer", "x")
    running = Engine(
        roles, EngineConfig(4, 16), stop_text=lambda r: found if r.num_output_tokens == 3 else None
    )
    (output,) = running.run([Arrival(0.0, [1, 2], stop)]).outputs
    assert (output.finish_reason, len(output.output_token_ids)) == ("stop", 3)
    assert (output.text, output.stop_reason) == ("the answer", "x")


def test_a_closed_loop_asks_again_after_an_answer_and_after_a_refusal() -> None:
    def follow(request, now):
        if len(request.id) < 3:
            yield ask(4, 1, time=now + 1.0, id=request.id + "+")

    result = engine().run([ask(4, 1, id="a"), ask(0, 1, id="b")], follow)
    assert [o.id for o in result.outputs] == ["a", "b", "b+", "a+", "b++", "a++"]
    assert result.outputs[-1].arrival_time == pytest.approx(2.02)


def test_a_lazy_workload_is_read_one_arrival_ahead() -> None:
    read = []

    def endless():
        for i in range(1000):
            read.append(i)
            yield ask(4, 1, time=float(i))

    running = engine()
    running.arrivals.stream(endless())
    for _ in range(6):
        running.step()
    assert len(read) <= 5


def test_ctrl_c_keeps_partial_results_and_says_so() -> None:
    class Impatient(Observer):
        closed = None

        def on_step(self, record):
            if record.step == 3:
                raise KeyboardInterrupt

        def close(self, result):
            self.closed = result

    watching = Impatient()
    result = engine(observers=[watching]).run([ask(4, 2), ask(4, 20), ask(4, 2, time=99.0)])
    assert result.status == "interrupted" and watching.closed is result
    assert [o.state for o in result.outputs] == ["finished", "aborted"], "the third never arrived"
    assert len(result.outputs[1].output_token_ids) == 4


def test_observers_hear_of_every_step_and_of_every_request_once() -> None:
    class Counts(Observer):
        def __init__(self):
            self.started, self.steps, self.requests, self.closed = 0, [], [], 0

        def on_start(self, run):
            self.started += 1

        def on_step(self, record):
            self.steps.append(record.step)

        def on_requests(self, finished):
            self.requests += [r.id for r in finished]

        def close(self, result):
            self.closed += 1

    counts = Counts()
    result = engine(observers=[counts]).run([ask(4, 2, id="a"), ask(0, id="b"), ask(4, 3, id="c")])
    assert (counts.started, counts.closed) == (1, 1)
    assert counts.steps == list(range(result.num_steps))
    assert sorted(counts.requests) == ["a", "b", "c"]


def test_a_step_record_says_what_happened() -> None:
    records = []

    class Records(Observer):
        def on_step(self, record):
            records.append(record)

    engine(observers=[Records()]).run([ask(6, 3), ask(6, 2)])
    assert [r.emitted for r in records] == [2, 2, 1]
    assert [(r.start, r.end) for r in records] == [
        pytest.approx((0.01 * i, 0.01 * (i + 1))) for i in range(3)
    ]
    assert [r.num_running for r in records] == [2, 1, 0]
    assert all(len(r.tokens) == len(r.plan.requests) for r in records)


# ---- roles -----------------------------------------------------------------------------------------------


def test_callbacks_come_in_the_order_of_a_request_s_life() -> None:
    class Life(Order):
        def __init__(self):
            self.heard = []

        def order(self, view):
            return view.waiting

        def on_arrival(self, request, now):
            self.heard.append(("arrival", request.id, now))

        def on_admit(self, request, now):
            self.heard.append(("admit", request.id, now))

        def on_preempt(self, request, now):
            self.heard.append(("preempt", request.id, now))

        def on_finish(self, request, now):
            self.heard.append(("finish", request.id, now))

    def script(step, view):
        if view.step == 1:
            step.preempt(view.running[0])
        else:
            everybody(step, view)

    life = Life()
    engine(script, roles={"order": life}).run([ask(4, 2, id="x", time=1.0)])
    assert [(what, id) for what, id, _ in life.heard] == [
        (w, "x") for w in ("arrival", "admit", "preempt", "admit", "finish")
    ]
    assert [now for *_, now in life.heard] == pytest.approx([1.0, 1.0, 1.01, 1.01, 1.02])


def test_one_object_in_several_roles_is_set_up_once_and_hears_everything_once() -> None:
    @dataclass
    class Both(Scheduler):
        def setup(self, ctx):
            super().setup(ctx)
            self.setups = getattr(self, "setups", 0) + 1
            self.finished = 0

        def plan(self, step, view):
            for request in (*view.running, *self.order(view)):
                step.add(request)

        def order(self, view):
            return view.waiting

        def on_finish(self, request, now):
            self.finished += 1

    both = Both()
    engine(roles={"scheduler": both, "order": both}).run([ask(4, 1)])
    assert (both.setups, both.finished) == (1, 1)


def test_every_role_has_a_random_stream_of_its_own_from_the_seed() -> None:
    def numbers(seed: int) -> tuple[float, float]:
        running = engine(seed=seed)
        return running.roles["order"].rng.random(), running.roles["victim"].rng.random()

    assert numbers(1) == numbers(1) != numbers(2)
    assert numbers(1)[0] != numbers(1)[1]
    assert random.Random("1/order=fcfs").random() == numbers(1)[0]


def test_a_role_that_needs_a_service_is_refused_when_there_is_none() -> None:
    class Needs(Order):
        plugin_name = "order=needs"
        requires = ("predictor",)

        def order(self, view):
            return view.waiting

    with pytest.raises(ConfigError, match="order=needs needs predictor, and none is chosen: set predictor="):
        engine(roles={"order": Needs()})


def test_a_missing_role_is_named() -> None:
    with pytest.raises(ConfigError, match="the engine needs a order|needs an? order"):
        Engine({"scheduler": Scripted(everybody)})


# ---- decisions and clocks --------------------------------------------------------------------------------


def test_the_decision_log_hashes_what_was_decided_and_not_when() -> None:
    def run(step_seconds: float, **limits) -> str:
        return (
            engine(executor=OracleExecutor(num_blocks=16, step_seconds=step_seconds), **limits)
            .run([ask(9, 4), ask(9, 4)])
            .decision_hash
        )

    assert run(0.01) == run(0.5)
    assert run(0.01) != run(0.01, max_num_batched_tokens=5)


def test_a_recorded_clock_played_back_gives_the_same_readings() -> None:
    inner = VirtualClock()
    recording = RecordingClock(inner)
    assert recording.now() == 0.0 and recording.readings == []  # nobody asked for it
    recording.record()
    said = [recording.now()]
    recording.advance_to(2.0)
    said.append(recording.now())
    recording.advance_to(1.0)
    said.append(recording.now())
    assert said == [0.0, 2.0, 2.0] == recording.readings
    replayed = ReplayClock(recording.readings)
    assert [replayed.now() for _ in range(4)] == [0.0, 2.0, 2.0, 2.0]


def test_the_oracle_executor_fails_on_a_wrong_read() -> None:
    """The check of all checks: corrupt one slot, and the next step that reads it fails."""
    running = engine()
    running.add(ask(6, 5, id="x"))
    running.step()
    running.executor._slots[running.running.items[0].block_table[0] * 4 + 1] = 0
    with pytest.raises(WrongKV, match=r"request x, chunk \[6, 7\): slot .* should hold") as caught:
        running.step()
    assert isinstance(caught.value, InvariantError)


def test_base_methods_say_that_they_are_missing() -> None:
    for role in (Order(), Retention()):
        assert isinstance(role, Role)
    with pytest.raises(NotImplementedError):
        Order().order(None)
