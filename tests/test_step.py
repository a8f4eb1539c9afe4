"""StepBuilder and View: what a policy may do in a step, what it is told, and what is refused with a message
that teaches."""

from __future__ import annotations

from random import Random

import pytest
from helpers.scripted import ask, engine, everybody

from core.errors import PolicyError
from core.inputs import Tags
from core.plan import Chunk
from core.policy import Admission, Admit, ChunkSize, Defer, Order, Reject, Victim
from core.request import RequestList, RequestState
from core.step import Granted, NeedBlocks, NoBudget, NotReady, StepBuilder
from core.testing.oracle import OracleExecutor
from plugins.cache.none import NoCache
from plugins.schedulers.victim.newest import Newest


def first_step(script, arrivals, **options) -> None:
    """Runs the script for one step."""
    running = engine(script, **options)
    for arrival in arrivals:
        running.add(arrival)
    running.step()


def failing(script, arrivals, **options) -> PolicyError:
    with pytest.raises(PolicyError) as caught:
        engine(script, **options).run(arrivals)
    return caught.value


# ---- add -------------------------------------------------------------------------------------------------


def test_add_grants_a_whole_prompt_then_one_token_a_step() -> None:
    grants = []

    def script(step, view):
        for request in (*view.running, *view.waiting):
            grants.append(step.add(request))

    engine(script).run([ask(6, 3)])
    assert grants == [Granted(6), Granted(1), Granted(1)]
    assert all(grants)


def test_lists_that_did_not_change_are_not_copied_for_the_next_step() -> None:
    """A hundred thousand requests may wait; what changed while a step was planned is seen by the next one."""
    seen = []

    def script(step, view):
        seen.append((view.running, view.waiting))
        for request in (*view.running, *view.waiting[:1]):
            step.add(request)

    engine(script, max_num_seqs=1, num_blocks=64).run(
        [ask(3, 4, id="a"), ask(3, 1, id="b"), ask(3, 1, id="c")]
    )
    (_, first), (one, second), (still, third), *_ = seen
    assert [r.id for r in first] == ["a", "b", "c"] and [r.id for r in second] == ["b", "c"]
    assert third is second and still is one


@pytest.mark.parametrize("seed", range(40))
def test_add_decodes_is_add_of_each_that_decodes(seed) -> None:
    """With preemptions, tokens in flight and a budget that ends among the decodes."""
    rng = Random(seed)
    tokens, blocks, depth = rng.randint(2, 8), rng.randint(7, 14), rng.randint(1, 3)
    arrivals = [ask(rng.randint(1, 9), rng.randint(1, 12), id=f"r{i}") for i in range(8)]

    def one_by_one(step, requests):
        prompts = []
        for request in requests:
            if request.num_new_tokens > 1:
                prompts.append(request)
            else:
                step.add(request)
        return prompts

    def decided(add_decodes):
        def script(step, view):
            step.limit(tokens=tokens)
            for request in add_decodes(step, view.running):
                step.add(request, 3)
            for request in view.waiting:
                if isinstance(step.add(request, 3), NoBudget | NeedBlocks):
                    break

        run = engine(script, num_blocks=blocks, max_inflight=depth).run(arrivals)
        return run.decision_hash, run.num_preemptions

    assert decided(StepBuilder.add_decodes) == decided(one_by_one)


def test_add_cuts_a_prompt_into_chunks_and_samples_only_at_its_end() -> None:
    chunks = []

    def script(step, view):
        for request in (*view.running, *view.waiting):
            step.add(request, 4)
        chunks.extend(
            (c.start, c.length, c.sample)
            for c in map(Chunk, step.requests, step.starts, step.lengths, step.samples)
        )

    engine(script).run([ask(10, 2)])
    assert chunks == [(0, 4, False), (4, 4, False), (8, 2, True), (10, 1, True)]


def test_the_view_names_running_requests_with_more_than_one_token_to_compute() -> None:
    seen = []

    def script(step, view):
        seen.append([r.id for r in view.prefilling])
        for request in (*view.running, *view.waiting):
            step.add(request, 4)

    engine(script).run([ask(10, 2, id="long"), ask(3, 2, id="short")])
    assert seen == [[], ["long"], ["long"], []]


def test_add_stops_at_the_token_budget_and_at_the_sequence_cap() -> None:
    grants = []

    def script(step, view):
        for request in view.waiting:
            grants.append(step.add(request))

    first_step(script, [ask(6), ask(6), ask(6)], max_num_batched_tokens=8)
    assert grants == [Granted(6), Granted(2), NoBudget()]
    grants.clear()
    first_step(script, [ask(2), ask(2), ask(2)], max_num_seqs=2)
    assert grants == [Granted(2), Granted(2), NoBudget()]
    assert not NoBudget()


def test_limit_only_ever_lowers_what_is_left() -> None:
    left = []

    def script(step, view):
        step.limit(tokens=5)
        step.limit(tokens=100, seqs=100)
        left.append((step.tokens_left, step.seqs_left, view.budget))
        everybody(step, view)

    first_step(script, [ask(6)])
    assert left == [(5, 4, (5, 4))]


def test_add_tells_how_many_blocks_are_missing() -> None:
    grants = []

    def script(step, view):
        for request in view.waiting:
            grants.append(step.add(request))

    first_step(script, [ask(12, 1), ask([1, 4, 2] * 4, 1)], num_blocks=4)
    assert grants == [Granted(12), NeedBlocks(2)]


def test_add_reports_cached_tokens_at_the_first_admission() -> None:
    grants = []

    def script(step, view):
        for request in (*view.running, *view.waiting):
            if not view.running or request in view.running:
                grants.append((request.id, step.add(request)))

    engine(script).run([ask(9, 2, id="first"), ask(9, 1, id="again", time=0.001)])
    assert grants == [("first", Granted(9)), ("first", Granted(1)), ("again", Granted(1, cached=8))]


def test_the_last_prompt_token_is_always_computed() -> None:
    result = engine().run([ask(8, 1), ask(8, 1, time=1.0)])
    assert result.outputs[1].num_cached_tokens == 4, "a full hit would leave nothing to sample from"


def test_add_answers_not_ready_while_the_next_token_is_in_flight() -> None:
    grants = []

    def script(step, view):
        for request in (*view.running, *view.waiting):
            grants.append(step.add(request))

    engine(script, executor=OracleExecutor(num_blocks=16, placeholders=False), max_inflight=2).run(
        [ask(4, 2)]
    )
    assert grants[:2] == [Granted(4), NotReady("its next token is in flight")]


def test_with_placeholders_a_token_in_flight_is_planned_upon() -> None:
    seen = []

    def script(step, view):
        everybody(step, view)
        seen.append((view.lag, step.num_seqs))

    engine(script, max_inflight=2).run([ask(4, 4)])
    assert (1, 1) in seen, "a step was planned while another was in flight"


def test_add_of_nothing_is_an_error() -> None:
    error = failing(lambda step, view: step.add(view.waiting[0], 0), [ask(id="x")])
    assert "add(num_tokens=0): expected at least 1" in str(error)
    assert (error.plugin, error.step, error.request) == ("scheduler=scripted", 0, "x")


def test_nobody_is_planned_twice() -> None:
    def script(step, view):
        everybody(step, view)
        everybody(step, view)

    error = failing(script, [ask(id="x")])
    assert "planned twice in one step" in str(error) and error.request == "x"


def test_an_ended_request_cannot_be_planned() -> None:
    kept = []

    def script(step, view):
        kept.extend(view.waiting)
        for request in kept:
            step.add(request)

    error = failing(script, [ask(4, 1, id="x"), ask(4, 1, time=1.0)])
    assert "add() of a request that is finished" in str(error) and error.request == "x"


def test_contains_counts_and_fits_describe_the_step_so_far() -> None:
    seen = []

    def script(step, view):
        first, second = view.waiting
        seen.append((first in step, step.num_seqs, step.num_tokens, step.fits(second)))
        step.add(first)
        seen.append((first in step, step.num_seqs, step.num_tokens, step.fits(second)))

    first_step(script, [ask(6), ask(6)], num_blocks=3)
    assert seen == [(False, 0, 0, True), (True, 1, 6, False)]


# ---- preempt and reject ----------------------------------------------------------------------------------


def preempting(mode: str):
    """Preempts the first request in step 2, then goes on."""

    def script(step, view):
        if view.step == 2:
            step.preempt(view.running[0], mode)
            return
        everybody(step, view)

    return script


@pytest.mark.parametrize(("mode", "recomputed"), [("recompute", 10), ("drop_tail", 2)])
def test_a_preempted_request_keeps_its_tokens_and_goes_on(mode: str, recomputed: int) -> None:
    running = engine(preempting(mode), roles={"cache": NoCache()})
    result = running.run([ask(9, 5)])
    (output,) = result.outputs
    assert output.output_token_ids == [running.executor.token("r0", p) for p in range(9, 14)]
    assert (output.num_preemptions, output.num_recomputed_tokens, output.num_cached_tokens) == (
        1,
        recomputed,
        0,
    )
    assert running.pool.num_used == 0


def test_what_was_published_before_a_preemption_is_found_again_and_is_no_hit() -> None:
    (output,) = engine(preempting("recompute")).run([ask(9, 5)]).outputs
    assert output.num_recomputed_tokens == 2, "two blocks of four came from the cache"
    assert output.num_cached_tokens == 0


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda step, runs, waits: step.preempt(waits), "only running requests can be preempted"),
        (lambda step, runs, waits: (step.add(runs), step.preempt(runs)), "already in this step"),
        (
            lambda step, runs, waits: step.reject(runs, "no"),
            "only requests that never started can be rejected",
        ),
        (
            lambda step, runs, waits: (step.preempt(runs), step.add(runs)),
            "planned after this policy preempted it in the same step",
        ),
        (lambda step, runs, waits: step.preempt(runs, "recmpute"), "Did you mean recompute"),
    ],
    ids=[
        "preempt a waiting one",
        "preempt a planned one",
        "reject a running one",
        "plan a preempted one",
        "misspelt mode",
    ],
)
def test_misuse_names_the_request_the_step_and_the_view(act, says: str) -> None:
    def script(step, view):
        if view.step == 0:
            step.add(view.waiting[0])
        else:
            act(step, view.running[0], view.waiting[0])

    error = failing(script, [ask(4, 9, id="runs"), ask(4, 9, id="waits")])
    assert says in str(error)
    assert (error.plugin, error.step) == ("scheduler=scripted", 1) and error.request == (
        "waits" if "only running" in says else "runs"
    )
    assert "view: step=1" in str(error)


def test_a_rejected_request_ends_with_its_reason_and_the_others_finish() -> None:
    def script(step, view):
        for request in view.waiting:
            if request.num_prompt_tokens > 8:
                step.reject(request, "too long for me")
            else:
                step.add(request)
        for request in view.running:
            step.add(request)

    result = engine(script).run([ask(4, 2), ask(12, 2), ask(4, 2)])
    assert [(o.state, o.finish_reason) for o in result.outputs] == [
        ("finished", "length"),
        ("rejected", "too long for me"),
        ("finished", "length"),
    ]


# ---- when blocks run out ---------------------------------------------------------------------------------


def test_a_running_request_that_lacks_a_block_preempts_whom_the_victim_names() -> None:
    preempted = []

    class Watched(Newest):
        def on_preempt(self, request, now):
            preempted.append(request.id)

    running = engine(roles={"cache": NoCache(), "victim": Watched()}, num_blocks=4)
    result = running.run([ask([1, 1, 1, 2], 8, id="old"), ask([2, 2, 1, 3], 8, id="new")])
    assert preempted and set(preempted) == {"new"}
    assert [o.state for o in result.outputs] == ["finished", "finished"]


def test_a_victim_may_name_only_running_requests() -> None:
    class Stranger(Victim):
        plugin_name = "victim=stranger"

        def on_finish(self, request, now):
            self.ended = request

        def victims(self, need, view):
            return [self.ended]

    first = ask([3], 1, id="gone")
    error = failing(
        everybody,
        [first, ask([1, 1, 1, 2], 8), ask([2, 2, 1, 3], 8)],
        roles={"cache": NoCache(), "victim": Stranger()},
        num_blocks=4,
    )
    assert "victims() named Request(gone, finished" in str(error) and error.plugin == "victim=stranger"


def test_a_waiting_request_never_preempts() -> None:
    running = engine(num_blocks=4, roles={"cache": NoCache()})
    result = running.run([ask(12, 4), ask([2] * 8, 2)])
    assert result.num_preemptions == 0
    assert result.outputs[1].first_scheduled_time >= result.outputs[0].finish_time


# ---- wake_at, order, chunk, admission --------------------------------------------------------------------


def test_a_policy_that_idles_says_until_when() -> None:
    def script(step, view):
        if view.now < 2.5:
            step.wake_at(2.5)
        else:
            everybody(step, view)

    result = engine(script).run([ask(4, 1)])
    assert result.outputs[0].first_scheduled_time == 2.5


def test_waking_now_means_the_next_turn() -> None:
    turns = []

    def script(step, view):
        turns.append(view.now)
        step.wake_at(view.now) if len(turns) < 5 else everybody(step, view)

    result = engine(script).run([ask(4, 1)])
    assert turns[:5] == sorted(set(turns[:5])), (
        "time moves, or a policy that waits for it would wait for ever"
    )
    assert result.outputs[0].first_scheduled_time < 1e-6


def test_who_asks_for_the_next_turn_for_ever_is_named() -> None:
    error = failing(lambda step, view: step.wake_at(view.now - 1.0), [ask()])
    assert error.plugin == "scheduler=scripted" and "asked 51 times in a row to be woken" in str(error)
    error = failing(everybody, [ask()], roles={"admission": Doorman(lambda request, view: Defer(view.now))})
    assert error.plugin == "admission=doorman" and "51 times not after now" in str(error)


@pytest.mark.parametrize("t", [float("nan"), float("inf"), None, "soon"])
def test_a_time_to_wake_is_finite(t) -> None:
    error = failing(lambda step, view: step.wake_at(t), [ask()])
    assert error.plugin == "scheduler=scripted" and f"wake_at({t!r}): expected a finite time" in str(error)
    if t is not None:
        error = failing(everybody, [ask()], roles={"admission": Doorman(lambda request, view: Defer(t))})
        assert error.plugin == "admission=doorman" and f"Defer({t!r}): expected a finite time" in str(error)


def test_an_order_is_consumed_lazily_and_no_further_than_the_window() -> None:
    taken = []

    class Endless(Order):
        def order(self, view):
            while True:
                for request in view.waiting:
                    taken.append(request.id)
                    yield request

    def script(step, view):
        for request in view.candidates(order, 256):
            if not step.add(request):
                break

    order = Endless()

    first_step(script, [ask(4, 1), ask(4, 1)], roles={"order": order}, max_num_seqs=1)
    assert taken == ["r0", "r1"]


def test_the_chunk_role_cuts_prompts_and_is_not_asked_about_decodes() -> None:
    asked = []

    class Three(ChunkSize):
        def tokens(self, request, left, view):
            asked.append(request.num_new_tokens)
            return min(left, 3)

    running = engine(roles={"chunk": Three()})
    running.run([ask(8, 3)])
    assert asked == [8, 5, 2]


@pytest.mark.parametrize("answer", [-1, 100])
def test_the_chunk_role_answers_within_what_is_left(answer: int) -> None:
    class Wrong(ChunkSize):
        plugin_name = "chunk=wrong"

        def tokens(self, request, left, view):
            return answer

    error = failing(everybody, [ask(8)], roles={"chunk": Wrong()})
    assert f"tokens() answered {answer}: expected 0 to 8" in str(error) and error.plugin == "chunk=wrong"


class Doorman(Admission):
    plugin_name = "admission=doorman"

    def __init__(self, answer) -> None:
        self.answer = answer

    def admit(self, request, view):
        return self.answer(request, view)


def test_admission_defers_until_a_time() -> None:
    door = Doorman(lambda request, view: Admit() if view.now >= 1.0 else Defer(1.0))
    assert engine(roles={"admission": door}).run([ask(4, 1)]).outputs[0].first_scheduled_time == 1.0


def test_admission_refuses_at_arrival_with_its_reason() -> None:
    door = Doorman(lambda request, view: Reject("full") if request.tags.client == "b" else Admit())
    result = engine(roles={"admission": door}).run(
        [ask(4, 1, tags=Tags(client="a")), ask(4, 1, tags=Tags(client="b"))]
    )
    assert [(o.state, o.finish_reason) for o in result.outputs] == [
        ("finished", "length"),
        ("rejected", "full"),
    ]


def test_admission_refuses_when_a_scheduler_tries_to_start_it() -> None:
    door = Doorman(lambda request, view: Reject("too late") if view.now > 0 else Defer(0.5))
    (output,) = engine(roles={"admission": door}).run([ask(4, 1)]).outputs
    assert (output.state, output.finish_reason, output.finish_time) == ("rejected", "too late", 0.5)


def test_admission_answers_one_of_three_things() -> None:
    def answer(request, view):
        return True if view.step == 0 and request.state is RequestState.WAITING else Admit()

    error = failing(everybody, [ask(4, 1)], roles={"admission": Doorman(answer)})
    assert (
        "admit() answered True: expected Admit, Defer or Reject" in str(error)
        and error.plugin == "admission=doorman"
    )


# ---- View ------------------------------------------------------------------------------------------------


def test_lists_of_the_view_are_in_order_of_arrival_and_do_not_change_under_a_policy() -> None:
    seen = []

    def script(step, view):
        before = view.running, view.waiting
        everybody(step, view)
        assert (view.running, view.waiting) == before, "snapshots of the step"
        seen.append([r.id for r in (*view.running, *view.waiting)])

    engine(script).run([ask(4, 2, id="b"), ask(4, 2, id="a"), ask(4, 3, id="c", time=0.001)])
    assert seen[0] == ["b", "a"] and seen[1] == ["b", "a", "c"]


def test_lists_are_as_the_step_began_also_for_who_looks_late() -> None:
    seen = []

    def script(step, view):
        for request in view.waiting:
            step.add(request)
        seen.append((len(view.running), view.num_running))
        for request in view.running:
            step.add(request)

    engine(script).run([ask(4, 2), ask(4, 2)])
    assert seen == [(0, 2), (2, 2)]


def test_the_view_counts_blocks() -> None:
    seen = []

    def script(step, view):
        everybody(step, view)
        kv = view.kv
        seen.append((kv.free, kv.evictable, kv.used, kv.available, kv.total, kv.pinned))

    engine(script, num_blocks=8).run([ask(8, 1), ask(4, 1, time=1.0)])
    assert seen[0] == (6, 0, 2, 6, 8, 0)
    assert seen[1] == (5, 2, 1, 7, 8, 0) or seen[1] == (6, 1, 1, 7, 8, 0)


def test_asking_for_a_service_that_is_not_there_says_what_to_set() -> None:
    error = failing(lambda step, view: view.predict(view.waiting[0]), [ask()])
    assert "set predictor=NAME, one of those that `python -m headway plugins` lists" in str(error)


def test_a_request_list_keeps_arrival_order_and_finds_its_members() -> None:
    running = engine()
    for arrival in (ask(time=0.0), ask(time=0.0), ask(time=0.0)):
        running.add(arrival)
    running._ingest(0.0)
    a, b, c = running.waiting
    items = RequestList()
    for request in (c, a, b):
        items.add(request)
    assert list(items) == [a, b, c] and len(items) == 3
    items.remove(b)
    assert list(items) == [a, c]
    with pytest.raises(KeyError):
        items.remove(b)


class Picky(Admission):
    """Refuses one request when it arrives."""

    plugin_name = "admission=picky"

    def __init__(self, refused: str) -> None:
        self.refused = refused

    def admit(self, request, view):
        return Reject("not this one") if request.id == self.refused else Admit()


def test_a_refusal_at_arrival_is_a_decision_like_any_other() -> None:
    asked = [ask(4, 1, id="a"), ask(4, 1, id="b")]
    hashes = {
        refused: engine(roles={"admission": Picky(refused)}).run(asked).decision_hash
        for refused in ("a", "b", "")
    }
    assert len(set(hashes.values())) == 3
    alone = [
        engine(roles={"admission": Picky(refused)}).run(asked[:1]).decision_hash for refused in ("a", "")
    ]
    assert alone[0] != alone[1]
