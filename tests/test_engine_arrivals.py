"""When requests arrive, under which names, and who goes on behind one that may not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from helpers.scripted import ask, engine

from core.compose.config import EngineConfig
from core.engine import Engine
from core.errors import NothingPlanned, PolicyError, WorkloadError
from core.executor import Executor
from core.inputs import SLO, Tags
from core.measure.metrics import ttft
from core.outside import Workload
from core.policy import Admission, Admit, Defer, Reject
from core.testing.oracle import OracleExecutor
from core.testing.subject import Subject

# ---- times ------------------------------------------------------------------------------------------------


def test_a_list_is_served_in_order_of_time_and_equal_times_as_they_stand() -> None:
    asked = [ask(time=0.0, id="z"), ask(time=50.0, id="b"), ask(time=1.0, id="a"), ask(time=1.0, id="c")]
    for arrivals in (asked, tuple(asked)):
        outputs = engine().run(arrivals).outputs
        assert [(o.id, o.first_scheduled_time) for o in outputs] == [
            ("z", 0.0),
            ("a", 1.0),
            ("c", 1.0),
            ("b", 50.0),
        ]


def test_a_stream_out_of_order_is_refused_with_workload_index_and_times() -> None:
    class Jumps(Workload):
        plugin_name = "workload=jumps"

    says = "workload=jumps: arrival 2 is at 1.0 s, after one at 50.0 s"
    with pytest.raises(WorkloadError, match=says) as caught:
        engine(roles={"workload": Jumps()}).run(ask(time=t) for t in (0.0, 50.0, 1.0))
    assert len(caught.value.partial.outputs) == 2


@pytest.mark.parametrize("time", [float("nan"), float("inf"), -float("inf"), -1.0, None, "0"])
@pytest.mark.parametrize("kind", [list, iter])
def test_a_time_is_a_finite_number_of_seconds_from_zero(time, kind) -> None:
    with pytest.raises(
        WorkloadError,
        match=r"the given arrivals: arrival 1 \(id 'x'\) is at .* expected a finite time of at least 0.0 s",
    ):
        engine().run(kind([ask(), ask(time=time, id="x"), ask(time=1.0)]))
    with pytest.raises(WorkloadError, match="Engine.add"):
        engine().add(ask(time=time))


def test_what_is_no_arrival_is_refused_and_does_not_end_the_workload() -> None:
    for kind in (list, iter):
        with pytest.raises(WorkloadError, match="arrival 1 is None: expected an Arrival"):
            engine().run(kind([ask(), None, ask()]))


def test_latency_targets_of_the_run_leave_a_list_a_list() -> None:
    from core.compose.build import with_slo

    given = with_slo([ask(time=5.0), ask(time=1.0)], SLO(ttft=1.0))
    assert [o.arrival_time for o in engine().run(given).outputs] == [1.0, 5.0]
    assert all(a.slo.ttft == 1.0 for a in given)


# ---- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        (("r1", None, None), ["r1", "r2", "r3"]),
        ((None, "r0", None), ["r1", "r0", "r2"]),
        ((None, None, "r0", "r1", "r2"), ["r3", "r4", "r0", "r1", "r2"]),
        (("a", None, "b", None), ["a", "r1", "b", "r3"]),
    ],
)
def test_automatic_ids_stay_clear_of_those_that_requests_bring(given, ids) -> None:
    outputs = engine().run([ask(id=id) for id in given]).outputs
    assert [o.id for o in outputs] == ids
    assert all(o.state == "finished" for o in outputs)


def test_automatic_ids_stay_clear_of_those_that_a_stream_has_brought() -> None:
    outputs = engine().run(ask(id=id) for id in ("r1", None, None)).outputs
    assert len({o.id for o in outputs}) == 3 and all(o.state == "finished" for o in outputs)


def test_automatic_ids_go_on_from_run_to_run() -> None:
    running = engine()
    assert [[o.id for o in running.run([ask(), ask()]).outputs] for _ in range(2)] == [
        ["r0", "r1"],
        ["r2", "r3"],
    ]


# ---- deferrals -------------------------------------------------------------------------------------------


@dataclass
class TokenBucket(Admission):
    """A client may have so many requests started a second, and says when the next one may."""

    client: str = "limited"
    rate: float = 0.5
    plugin_name = "admission=bucket"

    def setup(self, ctx):
        super().setup(ctx)
        self.next_at = 0.0

    def admit(self, request, view):
        return (
            Defer(self.next_at) if request.tags.client == self.client and view.now < self.next_at else Admit()
        )

    def on_admit(self, request, now):
        if request.tags.client == self.client:
            self.next_at = now + 1 / self.rate


SCHEDULERS = ("chunked", "fcfs", "pd_split", "preemptive")


def served(scheduler: str, admission: Admission, limited: int = 12, **limits) -> dict[str, list]:
    order = "priority" if scheduler == "preemptive" else "fcfs"
    roles = {**Subject((f"scheduler={scheduler}", f"order={order}")).plain_roles(), "admission": admission}
    roles["executor"] = OracleExecutor(num_blocks=32)
    asked = [ask(8, 2, tags=Tags(client="limited")) for _ in range(limited)]
    asked += [ask(8, 2, time=0.1 * i, tags=Tags(client="free")) for i in range(30)]
    config = {
        "block_size": 4,
        "num_blocks": 32,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "check": True,
    } | limits
    outputs = Engine(roles, EngineConfig(**config)).run(asked).outputs
    assert all(o.state in ("finished", "rejected") for o in outputs)
    return {client: [o for o in outputs if o.tags.client == client] for client in ("limited", "free")}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("max_inflight", [1, 2])
def test_a_request_that_admission_defers_stops_nobody_behind_it(scheduler: str, max_inflight: int) -> None:
    outputs = served(scheduler, TokenBucket(), max_inflight=max_inflight)
    assert max(ttft(o) for o in outputs["free"]) < 0.2
    starts = [o.first_scheduled_time for o in outputs["limited"]]
    assert [b - a for a, b in zip(starts, starts[1:], strict=False)] == [pytest.approx(2.0, abs=0.1)] * 11


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_more_deferred_requests_than_the_window_holds_stop_nobody_either(scheduler: str) -> None:
    outputs = served(scheduler, TokenBucket(rate=100.0), limited=270, check=False)
    assert max(ttft(o) for o in outputs["free"]) < 0.2


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_request_that_admission_rejects_stops_nobody_behind_it(scheduler: str) -> None:
    class Refuses(TokenBucket):
        def admit(self, request, view):
            waits = super().admit(request, view)
            return Reject("no more") if isinstance(waits, Defer) and view.now > 0 else waits

    outputs = served(scheduler, Refuses())
    assert max(ttft(o) for o in outputs["free"]) < 0.2 and {o.state for o in outputs["limited"]} == {
        "finished",
        "rejected",
    }


@pytest.mark.parametrize("scheduler", ("fcfs", "pd_split"))
def test_a_deferred_request_stops_nobody_where_it_would_not_fit_either(scheduler: str) -> None:
    roles = {**Subject((f"scheduler={scheduler}",)).plain_roles(), "admission": TokenBucket()}
    roles["executor"] = OracleExecutor(num_blocks=16)
    config = EngineConfig(block_size=4, num_blocks=16, max_num_seqs=4, max_num_batched_tokens=16, check=True)
    limited = [ask(45, 2, time=0.01 * i, tags=Tags(client="limited")) for i in range(2)]
    free = [ask(8, 9, time=0.1 + 0.05 * i, tags=Tags(client="free")) for i in range(8)]
    outputs = Engine(roles, config).run([*limited, *free]).outputs
    assert max(ttft(o) for o in outputs if o.tags.client == "free") < 0.2


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_who_lacks_blocks_is_not_overtaken(scheduler: str) -> None:
    """Small requests keep coming; a large one that waits for blocks starts as soon as those before it have
    ended."""
    order = "priority" if scheduler == "preemptive" else "fcfs"
    roles = {
        **Subject((f"scheduler={scheduler}", f"order={order}", "cache=none")).plain_roles(),
        "executor": OracleExecutor(num_blocks=16),
    }
    config = EngineConfig(
        block_size=4, num_blocks=16, max_num_seqs=8, max_num_batched_tokens=64, max_inflight=2, check=True
    )
    small = [ask(8, 12, time=0.02 * i) for i in range(60)]
    large = ask(50, 2, time=0.1, id="large")
    outputs = {o.id: o for o in Engine(roles, config).run([*small, large]).outputs}
    before = [o for o in outputs.values() if o.arrival_time <= 0.1]
    assert outputs["large"].first_scheduled_time <= max(o.finish_time for o in before) + 0.05


# ---- time that has passed --------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_wait_that_rounds_to_now_ends(scheduler: str) -> None:
    """A bucket that lacks so little that now + what it lacks is now again: time moves, and it fills."""

    class Fills(Admission):
        def admit(self, request, view):
            lacks = (self.opens - view.now) / 2
            return Admit() if lacks <= 0 else Defer(view.now + lacks)

        def setup(self, ctx):
            super().setup(ctx)
            self.opens = 7.3

    outputs = served(scheduler, Fills(), limited=1)
    assert min(o.first_scheduled_time for o in outputs["free"]) == pytest.approx(7.3, abs=1e-3)


def test_polling_reaches_what_it_waits_for() -> None:
    class Polls(Admission):
        met = False

        def admit(self, request, view):
            self.met = self.met or view.num_waiting > 1
            return Admit() if self.met else Defer(view.now)

    running = engine(roles={"admission": Polls()})
    outputs = running.run([ask(), ask(time=40.0)]).outputs
    assert [o.first_scheduled_time for o in outputs] == [40.0, 40.0]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_who_defers_for_ever_is_named(scheduler: str) -> None:
    class Never(Admission):
        plugin_name = "admission=never"

        def admit(self, request, view):
            return Defer(view.now)

    with pytest.raises(PolicyError, match="asked 51 times in a row to be woken") as caught:
        served(scheduler, Never())
    assert caught.value.plugin == "admission=never"
    never = Never()
    never.admit = lambda request, view: Defer()
    with pytest.raises(NothingPlanned):
        served(scheduler, never)


def test_who_is_always_woken_a_little_later_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.patience.MOST_IDLE_TURNS", 1000)
    with pytest.raises(
        PolicyError, match="asked 1001 times in a row to be woken, 0 times not after now"
    ) as caught:
        engine(lambda step, view: step.wake_at(view.now + 0.001)).run([ask()])
    assert caught.value.plugin == "scheduler=scripted"


def test_an_executor_without_times_is_stopped_too() -> None:
    @dataclass
    class Timeless(OracleExecutor):
        def collect(self, ticket):
            return replace(super().collect(ticket), end=float("inf"))

    assert issubclass(Timeless, Executor)
    with pytest.raises(PolicyError, match="expected finite seconds"):
        engine(executor=Timeless()).run([ask()])


# ---- a plan behind a running step ------------------------------------------------------------------------


class Patient(OracleExecutor):
    """Waits until just before the step in flight ends, when it is asked to."""

    asked = 0

    def linger(self) -> None:
        self.asked += 1
        self.clock.advance_to(self.server.free_at - 1e-4)


@pytest.mark.parametrize(("executor", "served"), [(OracleExecutor, 0.02), (Patient, 0.01)])
def test_who_arrives_during_a_step_is_in_the_next_plan_of_an_executor_that_can_wait(executor, served) -> None:
    """Steps take 10 ms. The next plan is made when the step before begins, or when it is about to end."""
    arrivals = [ask(4, 20, id="first"), ask(4, 2, time=0.0501, id="second")]
    outputs = {
        o.id: o for o in engine(executor=executor(num_blocks=16), max_inflight=2).run(arrivals).outputs
    }
    began = outputs["second"].token_times[0] - 0.01
    assert began - 0.05 == pytest.approx(served)


def test_nobody_waits_for_arrivals_where_none_can_come() -> None:
    patient = Patient(num_blocks=16)
    engine(executor=patient, max_inflight=2).run([ask(4, 9), ask(5, 9)])
    assert patient.asked == 0
    engine(executor=(alone := Patient(num_blocks=16)), max_inflight=1).run([ask(4, 9), ask(5, 9, time=0.03)])
    assert alone.asked == 0  # a plan with nothing in flight is needed at once
