"""Orders by service received: who is fair, who sinks, and what nobody can save up."""

from __future__ import annotations

from random import Random

import pytest
from helpers.policy_runs import Server, Steps, ask, compose, finishing, run, service

from core.compose.config import EngineConfig
from core.errors import ConfigError

# ---- virtual token counter --------------------------------------------------------------------------------

WP, WQ = 1.0, 2.0
POOL = EngineConfig(block_size=4, num_blocks=60, max_num_seqs=64, max_num_batched_tokens=128)
KV_TOKENS = POOL.block_size * POOL.num_blocks
LONGEST = 24


def two_clients(seed: int, count: int = 150) -> list:
    """Both always have requests waiting until the end: "greedy" asks for longer answers, three times as
    often."""
    rng = Random(seed)
    greedy = [
        ask(0.0, rng.randint(4, LONGEST), rng.randint(10, 40), client="greedy") for _ in range(3 * count)
    ]
    modest = [ask(0.0, rng.randint(4, LONGEST), rng.randint(5, 20), client="modest") for _ in range(count)]
    mixed = greedy + modest
    rng.shuffle(mixed)
    return mixed


def differences(order, asked, **choices) -> list[float]:
    """Service difference after every step in which both clients had requests waiting."""
    steps = Steps()
    engine = compose(order=order, observers=[steps], engine=POOL, **choices)
    last_start: dict[str, float] = {}
    for o in engine.run(asked).outputs:
        last_start[o.tags.client] = max(last_start.get(o.tags.client, 0.0), o.first_scheduled_time)
    until = min(last_start.values())
    found = [s for end, s in service(steps, WP, WQ) if end <= until]
    assert len(found) > 50
    return [abs(s.get("greedy", 0.0) - s.get("modest", 0.0)) for s in found]


@pytest.mark.parametrize("seed", range(4))
def test_vtc_bounds_the_service_difference_of_backlogged_clients_and_fcfs_does_not(seed):
    bound = 2 * max(WP * LONGEST, WQ * KV_TOKENS)
    asked = two_clients(seed)
    assert max(differences(("vtc", {"wp": WP, "wq": WQ}), asked)) <= bound
    fcfs = differences("fcfs", asked)
    assert max(fcfs) > bound
    assert fcfs[-1] > 1.8 * fcfs[len(fcfs) // 2] > 0  # it keeps growing


def test_vtc_gives_weighted_clients_service_in_proportion():
    asked = two_clients(0)
    steps = Steps()
    engine = compose(order=("vtc", {"weights": {"greedy": 3.0}}), observers=[steps], engine=POOL)
    for a in asked:
        engine.add(a)
    while {"greedy", "modest"} <= set(engine.roles["order"].queues) or engine.counts.num_steps < 2:
        engine.step()
    _, total = service(steps)[-1]
    assert total["greedy"] / total["modest"] == pytest.approx(3.0, rel=0.15)


def test_vtc_lifts_a_client_that_comes_back_so_that_it_cannot_save_up():
    asked = [ask(0.0, 4, 10, f"busy{i}", client="busy") for i in range(40)]
    asked += [ask(2.0, 4, 10, f"idle{i}", client="idle") for i in range(20)]
    order = finishing(run(asked, order="vtc"))
    start = order.index("idle0")
    turns = [id.startswith("idle") for id in order[start : start + 20]]
    # half of what follows; without the lift, all twenty idle requests would come first
    assert abs(sum(turns) - 10) <= 1


def test_vtc_lifts_to_the_client_that_left_last_when_nobody_waits():
    engine = compose(order="vtc")
    engine.add(ask(0.0, 4, 10, client="a"))
    while engine.step():
        pass
    engine.add(ask(engine.clock.inner.now(), 4, 10, client="b"))
    engine.step()
    counters = engine.roles["order"].counters
    assert counters["a"] == 4 + 2 * 10
    assert counters["b"] >= counters["a"]


def test_vtc_charges_an_admission_once_and_every_token_as_it_comes():
    """The pool forces preemptions; what is computed again is nobody's service."""
    engine = compose(
        order=("vtc", {"wp": 3.0, "wq": 5.0}),
        engine=EngineConfig(block_size=2, num_blocks=16, max_num_seqs=4),
    )
    result = engine.run([ask(0.0, 6, 9, client="ab"[i % 2]) for i in range(8)])
    assert result.num_preemptions > 0
    # "b" comes after "a" has begun to wait, so both start at 0
    assert engine.roles["order"].counters == {"a": 4 * (6 * 3 + 9 * 5), "b": 4 * (6 * 3 + 9 * 5)}


def test_vtc_passes_over_a_request_that_cannot_start_and_offers_the_next_client():
    engine = compose(order="vtc")
    for client in "abc":
        engine.add(ask(0.0, 4, 2, client=client))
        engine.add(ask(0.0, 4, 2, client=client))
    engine._ingest(0.0)
    engine.view.begin_step(0, 0.0, 0)
    order = engine.roles["order"]
    for _ in range(2):  # nothing is admitted, so the next step sees the same
        assert [r.tags.client for r in order.order(engine.view)] == ["a", "b", "c"]


# ---- deficit longest prefix match ------------------------------------------------------------------------


def prefix_clients(count: int = 40) -> list:
    """Two clients, each with four prefixes of 64 tokens; "heavy" sends three times as much, interleaved."""
    rng, asked = Random(7), []
    for i in range(count):
        for client, times in (("heavy", 3), ("light", 1)):
            for j in range(times):
                head = [100 + (hash_of(client) + (i + j) % 4) % 1000] * 64
                asked.append(
                    ask(0.0, [*head, *(rng.randrange(2000, 9000) for _ in range(8))], 8, client=client)
                )
    return asked


def hash_of(name: str) -> int:
    return 10 * len(name) + ord(name[0])


SMALL = EngineConfig(block_size=8, num_blocks=48, max_num_seqs=4, max_num_batched_tokens=256)


def locality_and_gap(order) -> tuple[int, float]:
    steps = Steps()
    result = run(prefix_clients(), order=order, cache="radix", engine=SMALL, observers=[steps])
    light = max(o.first_scheduled_time for o in result.outputs if o.tags.client == "light")
    heavy = max(o.first_scheduled_time for o in result.outputs if o.tags.client == "heavy")
    served = [s for end, s in service(steps) if end <= min(light, heavy)]
    gap = max(abs(s.get("heavy", 0.0) - s.get("light", 0.0)) for s in served)
    return sum(o.num_cached_tokens for o in result.outputs), gap


def test_dlpm_is_more_local_than_vtc_and_fairer_than_lpm():
    (vtc, _), (lpm, lpm_gap) = locality_and_gap("vtc"), locality_and_gap(("lpm", {"fcfs_above": 10**6}))
    dlpm, dlpm_gap = locality_and_gap(("dlpm", {"quantum": 256.0}))
    assert vtc < dlpm <= lpm
    assert dlpm_gap < lpm_gap


def test_a_smaller_quantum_makes_dlpm_fairer():
    gaps = [locality_and_gap(("dlpm", {"quantum": q}))[1] for q in (64.0, 1024.0, 1e9)]
    assert gaps[0] < gaps[1] < gaps[2]


def test_dlpm_refuses_a_quantum_that_never_refills():
    with pytest.raises(ConfigError, match="order.quantum=0"):
        compose(order=("dlpm", {"quantum": 0.0}))


# ---- feedback queues -------------------------------------------------------------------------------------

MLFQ = {"num_queues": 4, "quantum": 0.034, "ratio": 2.0, "starve_limit": 1e9}


def test_mlfq_demotes_by_attained_service():
    engine = compose(order=("mlfq", MLFQ), server=Server(overhead=0.01))
    engine.add(ask(0.0, 1, 100))
    seen = []
    for _ in range(50):
        engine.step()
        seen.append(engine.roles["order"].level(next(iter(engine.running))))
    # 4 steps of 10 ms exceed 34 ms, 7 steps 68 ms, 14 steps 136 ms; the last level is for good.
    assert [seen.count(level) for level in range(4)] == [3, 7, 14, 26]
    assert seen == sorted(seen)


def test_mlfq_skips_to_the_level_whose_quantum_covers_the_prefill():
    engine = compose(order=("mlfq", MLFQ), server=Server(overhead=0.01, per_token=0.001))
    # prefills of 11, 33, 36, 67, 71 and 5010 ms; quanta of 34, 68, 136 ms
    for tokens in (1, 23, 26, 57, 61, 5000):
        engine.add(ask(0.0, tokens, 1))
    engine._ingest(0.0)
    assert [engine.roles["order"].level(r) for r in engine.waiting] == [0, 0, 1, 1, 2, 3]


def test_mlfq_has_levels_without_end_unless_it_is_told():
    """With a quantum of 10 ms that doubles, 8 levels would be used up after 1.27 s of service and all that is
    older be served by age.
    """
    quanta = [0.01 * 2**i for i in range(12)]
    for queues, expected in ((None, 11), (8, 7)):
        engine = compose(order=("mlfq", {"num_queues": queues}), server=Server(overhead=0.005))
        engine.add(ask(0.0, 1, round(1.05 * sum(quanta[:11]) / 0.005)))
        seen = set()
        while engine.step():
            seen |= {engine.roles["order"].level(request) for request in engine.running}
        assert max(seen) == expected
    engine = compose(order="mlfq", server=Server(overhead=0.0, per_token=0.01))
    for tokens in (1, 2, 512, 513):  # prefills of 10 ms, 20 ms, 5.12 s and 5.13 s
        engine.add(ask(0.0, tokens, 1))
    engine._ingest(0.0)
    assert [engine.roles["order"].level(r) for r in engine.waiting] == [0, 1, 9, 10]


def test_mlfq_without_a_cost_model_takes_the_seconds_a_token_it_is_given():
    server = Server()
    server.cost_model = None
    engine = compose(order=("mlfq", MLFQ | {"seconds_per_token": 0.001}), server=server)
    engine.add(ask(0.0, 50, 1))
    engine._ingest(0.0)
    assert engine.roles["order"].level(next(iter(engine.waiting))) == 1


def test_mlfq_serves_short_requests_first_without_knowing_lengths():
    asked = [ask(0.0, 1, 60, "long"), *(ask(0.2 + 0.05 * i, 1, 2, f"s{i}") for i in range(5))]
    assert finishing(run(asked, order=("mlfq", MLFQ), scheduler="preemptive"))[-1] == "long"
    assert finishing(run(asked))[0] == "long"


def test_mlfq_promotes_who_starves():
    asked = [ask(0.0, 1, 20, "long"), *(ask(0.04 + 0.019 * i, 1, 2, f"s{i}") for i in range(80))]
    place = {
        limit: finishing(
            run(asked, order=("mlfq", MLFQ | {"starve_limit": limit}), scheduler="preemptive")
        ).index("long")
        for limit in (1e9, 0.1)
    }
    assert place[0.1] < place[1e9] == 80


def test_plas_puts_a_new_program_before_one_that_was_served_for_long():
    """An agent of many short calls against a single new call: MLFQ over calls would treat every call of the
    agent as new."""
    order = ("plas", {"num_queues": 4, "quantum": 0.05, "beta": 1e9})
    engine = compose(order=order)
    asked = [ask(0.01 * i, 1, 2, f"agent{i}", session="agent") for i in range(20)] + [
        ask(0.201, 1, 2, "other", session="new")
    ]
    # The calls take twice as long as the gaps between them: half of them wait when the new program comes.
    assert finishing(engine.run(asked)).index("other") in (10, 11)
    assert finishing(run(asked, order=("mlfq", {"num_queues": 4, "quantum": 0.05})))[-1] == "other"


def test_plas_charges_all_calls_of_a_program_that_run_together():
    engine = compose(order="plas", engine=EngineConfig(max_num_seqs=4))
    for i in range(3):
        engine.add(ask(0.0, 1, 4, f"c{i}", session="p"))
    requests = []
    while engine.step():
        requests = requests or list(engine.running)
    assert engine.roles["order"].program(requests[0]).served == pytest.approx(3 * 4 * 0.01)


def test_plas_promotes_a_call_whose_program_waits_too_long_for_what_it_got():
    def asked() -> list:
        old = [ask(0.0, 1, 10, "old0", session="old"), ask(0.105, 1, 10, "old1", session="old")]
        return old + [ask(0.1 + 0.04 * i, 1, 5, f"new{i}", session=f"s{i}") for i in range(40)]

    place = {}
    for beta in (1e9, 2.0):
        order = finishing(run(asked(), order=("plas", {"num_queues": 4, "quantum": 0.06, "beta": beta})))
        place[beta] = order.index("old1")
    assert place[1e9] == 41 and place[2.0] < 20


PLAS = {"num_queues": 4, "quantum": 0.1, "ratio": 2.0, "beta": 1e9}


def plas_after(*calls, parameters=PLAS):
    """An engine after these have run, one after the other, and its order."""
    engine = compose(order=("plas", parameters), engine=EngineConfig(max_num_seqs=8))
    engine.run(list(calls))
    return engine, engine.roles["order"]


def arriving(engine, *calls) -> list:
    for call in calls:
        engine.add(call)
    engine._ingest(engine.clock.inner.now())
    return list(engine.waiting)


def test_plas_takes_a_call_without_a_session_for_a_program_of_its_own():
    """ "c" has been served for a second in one call; its next one is as new as anybody's, unless both name a
    session.
    """
    engine, order = plas_after(ask(0.0, 1, 100, client="c"), ask(0.0, 1, 100, client="c", session="s"))
    fresh, known = arriving(engine, ask(0.0, 1, 1, client="c"), ask(0.0, 1, 1, client="c", session="s"))
    assert order.level(fresh) == 0 and order.level(known) == 3


def test_plas_gives_a_call_the_whole_quantum_of_its_queue():
    """After 90 ms of its program's 104 in the first queue a call still has 104 ms there, then 208 in the
    second.
    """
    engine, order = plas_after(ask(0.0, 1, 9, session="s"), parameters=PLAS | {"quantum": 0.104})
    engine.add(ask(engine.clock.inner.now(), 1, 60, session="s"))
    levels = []
    while engine.step():
        levels += [order.level(request) for request in engine.running]
    assert [levels.count(level) for level in range(3)] == [10, 21, 28]


def test_plas_counts_completed_calls_only():
    """While a call of a second runs, the next one of its program starts at the top; when it has ended, at the
    bottom.
    """
    engine = compose(order=("plas", PLAS), engine=EngineConfig(max_num_seqs=8))
    order = engine.roles["order"]
    engine.add(ask(0.0, 1, 100, "long", session="s"))
    engine.add(ask(0.5, 1, 100, "beside", session="s"))
    engine.add(ask(1.2, 1, 100, "after", session="s"))
    first = {}
    while engine.step():
        for request in engine.running:
            first.setdefault(request.id, order.level(request))
    assert first == {"long": 0, "beside": 0, "after": 3}


def test_plas_promotion_begins_the_window_of_the_call_and_not_that_of_its_program():
    """The program has been served for 1 s: with beta = 0.5 a call is promoted after half a second, and the
    program keeps its second.
    """
    engine, order = plas_after(ask(0.0, 1, 100, session="s"), parameters=PLAS | {"beta": 0.5})
    (call,) = arriving(engine, ask(0.0, 1, 1, session="s"))
    began = engine.clock.inner.now()
    assert order.program(call).served == pytest.approx(1.0) and order.level(call) == 3
    for now, level in ((began + 0.49, 3), (began + 0.51, 0)):
        engine.view.begin_step(1, now, 0)
        order.order(engine.view)
        assert order.level(call) == level
    assert order.program(call).served == pytest.approx(1.0)


def test_atlas_charges_the_critical_path_and_plas_all_calls():
    """Three calls in parallel, of 80, 40 and 40 ms, then one that waits for all of them, and one for the
    shorter ones alone.
    """
    levels = {}
    for order in ("plas", "atlas"):
        engine = compose(order=(order, PLAS | {"quantum": 0.05}), engine=EngineConfig(max_num_seqs=8))
        engine.run([ask(0.0, 1, answer, f"c{i}", session="s") for i, answer in enumerate((8, 4, 4))])
        join = ask(0.0, 1, 1, "join", session="s", turn=1, parents=("c0", "c1", "c2"))
        short = ask(0.0, 1, 1, "short", session="s", turn=1, parents=("c1", "c2"))
        unsaid = ask(0.0, 1, 1, "unsaid", session="s", turn=1)
        fork = ask(0.0, 1, 1, "fork", session="s")
        levels[order] = [engine.roles["order"].level(r) for r in arriving(engine, join, short, unsaid, fork)]
    # Queues end at 50, 150 and 350 ms: all calls had 160 ms, the longest path 80, the shorter ones 40.
    assert levels == {"plas": [2, 2, 2, 2], "atlas": [1, 0, 1, 0]}


def test_atlas_adds_up_along_a_chain():
    engine = compose(order=("atlas", PLAS | {"quantum": 0.05}))
    before: tuple[str, ...] = ()
    for i in range(4):
        engine.run([ask(0.0, 1, 4, f"c{i}", session="s", turn=i, parents=before)])
        before = (f"c{i}",)
    (call,) = arriving(engine, ask(0.0, 1, 1, session="s", turn=4, parents=before))
    assert engine.roles["order"].standing(call) == pytest.approx(4 * 0.04)


@pytest.mark.parametrize("order", ["mlfq", "plas"])
def test_feedback_queues_refuse_parameters_that_make_no_queue(order):
    with pytest.raises(ConfigError, match="order.quantum=0"):
        compose(order=(order, {"quantum": 0.0}))
