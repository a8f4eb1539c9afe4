"""Pause: a request leaves the batch with its KV, waits, and goes on; memory pressure takes paused blocks
first."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from helpers.policy_runs import ask as served
from helpers.policy_runs import compose, run
from helpers.scripted import ask, engine, everybody

from core.compose.config import EngineConfig
from core.errors import PolicyError
from core.inputs import Tags
from core.measure.metrics import summarize
from core.policy import Need
from core.request import RequestState
from core.testing.subject import Subject
from core.testing.trial import Trial
from plugins.cache.none import NoCache
from plugins.schedulers.victim.newest import Newest


def pausing(at: int, until: int):
    """Sets the first running request aside in step `at`; nobody who is paused goes on before step `until`."""

    def script(step, view):
        if view.step == at:
            step.pause(view.running[0])
        for request in (*view.running, *view.waiting):
            if request.state is not RequestState.PAUSED or at < view.step >= until:
                step.add(request)

    return script


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("cache", ["none", "hash"])
def test_a_paused_request_goes_on_where_it_was(cache: str, depth: int) -> None:
    roles = {"cache": NoCache()} if cache == "none" else {}
    running = engine(pausing(4, 8), roles=roles, max_inflight=depth)
    result = running.run([ask(9, 8), ask([2, 2, 2, 2, 2], 12)])
    first, _ = result.outputs
    assert first.output_token_ids == [running.executor.token("r0", p) for p in range(9, 17)]
    assert (first.num_preemptions, first.num_recomputed_tokens) == (0, 0)
    assert (result.num_preemptions, result.num_pauses, running.pool.num_used) == (0, 1, 0)
    assert summarize(result)["pauses"] == 1


def test_a_half_computed_prompt_is_paused_and_goes_on_with_its_rest() -> None:
    """In chunks of three, six of eleven tokens are computed before the pause: the second block is half
    full."""
    planned = []

    def script(step, view):
        if view.step == 2:
            step.pause(view.running[0])
            return
        for request in (*view.running, *view.waiting):
            step.add(request, 3)
        planned.extend(zip(step.starts, step.lengths, strict=True))

    (output,) = engine(script).run([ask(11, 1)]).outputs
    assert planned == [(0, 3), (3, 3), (6, 3), (9, 2)] and output.num_recomputed_tokens == 0


def test_a_policy_sees_who_is_paused_and_what_they_hold() -> None:
    seen = []

    def script(step, view):
        if view.step == 1:
            step.pause(view.running[0])
        else:
            everybody(step, view)
        seen.append((len(view.paused), view.kv.paused))

    engine(script).run([ask(9, 3)])
    assert seen == [(0, 0), (1, 3), (0, 0), (0, 0)]


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda step, runs, waits: step.pause(waits), "only running requests can be preempted or paused"),
        (lambda step, runs, waits: (step.add(runs), step.pause(runs)), "already in this step"),
        (
            lambda step, runs, waits: (step.pause(runs), step.add(runs)),
            "planned after this policy preempted it",
        ),
    ],
    ids=["a waiting one", "a planned one", "plan it in the same step"],
)
def test_misuse_is_refused(act, says: str) -> None:
    def script(step, view):
        if view.step:
            act(step, view.running[0], view.waiting[0])
        else:
            step.add(view.waiting[0])

    with pytest.raises(PolicyError, match=says):
        engine(script).run([ask(4, 9), ask(4, 9)])


# ---- memory pressure -------------------------------------------------------------------------------------


def test_who_runs_takes_paused_blocks_before_it_preempts_anybody() -> None:
    """Six blocks of four: "a" is paused with two, "b" and "c" grow to three each, and "c" is the newest."""
    asked = [ask(7, 3, id="a"), ask(8, 5, id="b"), ask(8, 5, id="c")]
    result = engine(pausing(1, 6), roles={"cache": NoCache()}, num_blocks=6).run(asked)
    assert {o.id: o.num_preemptions for o in result.outputs} == {"a": 1, "b": 0, "c": 0}
    a = result.outputs[0]
    assert (a.num_recomputed_tokens, a.state, result.num_pauses) == (7, "finished", 1)


def test_who_wants_to_start_takes_paused_blocks_only_where_that_is_enough() -> None:
    """Four blocks of four, of which the paused one holds two and one that runs one."""
    answers = []

    def script(step, view):
        if view.step == 0:
            for request in view.waiting[:2]:
                step.add(request)
        elif view.step == 1:
            step.pause(view.running[0])
            step.add(view.running[1])
        elif view.step == 2:
            paused, small, big = view.waiting
            step.add(view.running[0])
            for request in (big, small):
                answers.append((request.id, step.fits(request), bool(step.add(request)), paused.state.value))
        else:
            everybody(step, view)

    asked = [ask(7, 2, id="a"), ask(1, 3, id="b"), ask(12, 2, id="small"), ask(15, 1, id="big")]
    asked[2] = replace(asked[2], prompt_token_ids=asked[2].prompt_token_ids[:9])
    result = engine(script, roles={"cache": NoCache()}, num_blocks=4).run(asked)
    assert answers == [("big", False, False, "paused"), ("small", True, True, "preempted")]
    assert {o.id: o.num_preemptions for o in result.outputs} == {"a": 1, "b": 0, "small": 0, "big": 0}


def test_the_victim_role_says_whose_paused_blocks_go_first() -> None:
    """By default those of the last to arrive; here "a" goes before "b"."""

    class OldestPaused(Newest):
        def paused(self, need, view):
            return view.paused

    def script(step, view):
        if view.step == 1:
            for request in view.running[:2]:
                step.pause(request)
        for request in view.running[2:] if view.step == 1 else (*view.running, *view.waiting):
            if request.id == "c" or view.step == 0 or view.step > 5:
                step.add(request)

    preempted = {}
    for victim in (Newest(), OldestPaused()):
        roles = {"cache": NoCache(), "victim": victim}
        result = engine(script, roles=roles, num_blocks=4).run(
            [ask(4, 2, id=id) for id in "ab"] + [ask(4, 6, id="c")]
        )
        preempted[type(victim).__name__] = "".join(o.id for o in result.outputs if o.num_preemptions)
    assert preempted == {"Newest": "b", "OldestPaused": "a"}


def test_a_victim_that_names_who_is_not_paused_is_refused() -> None:
    class NamesTheRunning(Newest):
        plugin_name = "victim=wrong"

        def paused(self, need, view):
            return reversed(view.running)

    roles = {"cache": NoCache(), "victim": NamesTheRunning()}
    with pytest.raises(
        PolicyError, match=r"victim=wrong.*which is not paused: yield requests of view.paused"
    ):
        engine(pausing(1, 6), roles=roles, num_blocks=6).run([ask(7, 3), ask(8, 5), ask(8, 5)])


def test_a_block_that_paused_requests_share_counts_once_and_not_for_who_matched_it() -> None:
    """ "a" and "b" hold the block of "first", which has ended, and one each of their own."""
    counts = []

    def script(step, view):
        if view.running and all(r.id in "ab" and r.num_output_tokens for r in view.running):
            for request in view.running:
                step.pause(request)
        elif len(view.paused) == 2 and not counts:
            third = view.waiting[-1]
            matched = view.match(third).blocks
            counts.append((view.kv.paused, len(matched), running.roster.paused.num_blocks(third, matched)))
            everybody(step, view)
        else:
            everybody(step, view)

    head = [1, 2, 3, 4]
    asked = [
        ask([*head, 1], 1, id="first"),
        ask([*head, 0], 9, id="a", time=0.011),
        ask([*head, 2], 9, id="b", time=0.011),
    ]
    running = engine(script)
    running.run([*asked, ask([*head, 3], 2, id="third", time=0.02)])
    assert counts == [(3, 1, 2)]


# ---- policies --------------------------------------------------------------------------------------------


def waves(seed: int, count: int = 40, **tags) -> list:
    """Long requests, and short ones that keep coming."""
    rng = Random(seed)
    asked = [served(0.0, rng.randint(20, 60), rng.randint(60, 120)) for _ in range(6)]
    return asked + [served(0.05 * i, rng.randint(1, 9), rng.randint(1, 8)) for i in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_where_memory_suffices_preemption_recomputes_nothing(seed: int) -> None:
    """4,000 blocks, of which at most a few hundred are used: who makes way is never displaced for its KV."""
    config = EngineConfig(block_size=4, num_blocks=4000, max_num_seqs=4)
    recomputed, kept = (
        run(
            waves(seed),
            order="srpt",
            predictor="oracle",
            scheduler=("preemptive", {"mode": mode}),
            engine=config,
        )
        for mode in ("recompute", "pause")
    )
    assert recomputed.num_preemptions > 5 and sum(o.num_recomputed_tokens for o in recomputed.outputs) > 400
    assert kept.kv_peak < 300 and kept.num_pauses > 5
    assert kept.num_preemptions == sum(o.num_recomputed_tokens for o in kept.outputs) == 0


@pytest.mark.parametrize("preset", ["fastserve", "autellix", "ltr", "srpt"])
def test_presets_that_preempt_recompute_nothing_where_memory_suffices(preset: str) -> None:
    from core.cli import presets

    roles = Subject(tuple(presets.words(preset))).choices
    asked = [replace(a, tags=Tags(session=f"s{i}")) for i, a in enumerate(waves(1))]
    result = run(asked, **roles, engine=EngineConfig(block_size=4, num_blocks=4000, max_num_seqs=4))
    assert result.num_pauses > 0
    assert result.num_preemptions == sum(o.num_recomputed_tokens for o in result.outputs) == 0


def test_where_memory_is_short_the_paused_compute_again_and_everybody_finishes() -> None:
    config = EngineConfig(block_size=4, num_blocks=60, max_num_seqs=4)
    for victim in ("newest", "pause_first"):
        result = run(
            waves(2), order="srpt", predictor="oracle", scheduler="preemptive", victim=victim, engine=config
        )
        assert {o.state for o in result.outputs} == {"finished"}
        assert result.num_pauses > result.num_preemptions > 0


def test_pause_first_takes_whom_the_order_would_serve_last() -> None:
    """Priorities a 1, b 3, c 0, d 2; "a" and "b" are paused, "c" and "d" run."""
    running = compose(victim="pause_first", order="priority", engine=EngineConfig(max_num_seqs=4))
    for id, priority in (("a", 1), ("b", 3), ("c", 0), ("d", 2)):
        running.add(served(0.0, 8, 9, id, priority=priority))
    running.step()
    running.view.begin_step(1, 0.01, 0)
    running.builder.begin(1, 0.01, 64, 4)
    for request in running.view.running[:2]:
        running.builder.pause(request)
    running.view.begin_step(2, 0.01, 0)
    victim, need = running.roles.victim, Need(running.view.running[0], 1)
    assert [r.id for r in victim.paused(need, running.view)] == ["b", "a"]
    assert [r.id for r in victim.victims(need, running.view)] == ["d", "c"]


# ---- executors, and what checks them ---------------------------------------------------------------------


def test_on_the_real_engine_a_pause_changes_no_token() -> None:
    torch_engines = pytest.importorskip("helpers.torch_engines")
    from headway import Arrival, Engine
    from plugins.schedulers.order.priority import Priority
    from plugins.schedulers.preemptive import Preemptive

    executor = torch_engines.prepared(torch_engines.variant("qwen3"))
    prompts = torch_engines.shared_prompts(250)
    alone = torch_engines.generate(torch_engines.engine_of(executor), prompts)
    for cache in ("none", "radix"):
        for depth in (1, 2):
            roles = torch_engines.engine_of(executor, cache=cache).roles.given | {
                "scheduler": Preemptive(token_budget=None, chunk_size=16, admit_on="prompt"),
                "order": Priority(),
            }
            config = EngineConfig(
                block_size=4,
                num_blocks=256,
                max_num_seqs=3,
                max_num_batched_tokens=64,
                check=True,
                max_inflight=depth,
            )
            running = Engine(roles, config)
            tags = [Tags(priority=len(prompts) - i) for i in range(len(prompts))]
            arrivals = [
                Arrival(0.0, p, torch_engines.GREEDY, id=f"p{i}", tags=tags[i]) for i, p in enumerate(prompts)
            ]
            paused = run_with_late(running, arrivals)
            assert [o.output_token_ids for o in paused.outputs] == alone
            assert (
                paused.num_pauses
                > 0
                == paused.num_preemptions
                == sum(o.num_recomputed_tokens for o in paused.outputs)
            )


def run_with_late(running, arrivals):
    """One more request every second turn, the more urgent the later, so that it displaces who runs."""
    running.add(arrivals[0])
    for turn in range(1, 2 * len(arrivals)):
        running.step()
        if turn % 2 == 0:
            running.add(arrivals[turn // 2])
    while running.step():
        pass
    return running.result()


def test_the_fuzz_pauses_resumes_and_takes() -> None:
    subject = Subject(("scheduler=erratic",))
    pauses = taken = resumed = 0
    for seed in range(60):
        outcome = Trial(subject.case(seed), subject.roles).run()
        assert outcome.failure is None, outcome.failure
        away: set[str] = set()
        for decision in outcome.decisions:
            pauses += len(decision.paused)
            away |= set(decision.paused)
            taken += len(away & set(decision.preempted))
            away -= set(decision.preempted)
            resumed += len(away & set(decision.admitted))
            away -= set(decision.admitted)
    assert pauses > 20 and taken > 5 and resumed > 10
