"""A recorded run repeats decision for decision, whatever its clock did; and two executors under the same step
times agree."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
from helpers.roles import default_roles

from core.compose.build import Composition, check
from core.compose.build import build as compose
from core.compose.config import EngineConfig, Hardware, ModelShape
from core.compose.defaults import default_choices
from core.compose.hooks import load_registry
from core.engine import Engine
from core.errors import ConfigError, ModelError
from core.inputs import SLO, Arrival, SamplingParams, Tags
from core.outputs import TextStop
from core.testing import kit
from core.testing.oracle import OracleExecutor
from plugins.executors.record import recording
from plugins.executors.replay import (
    Record,
    RecordedTimes,
    Replay,
    ReplayError,
    Verifier,
)
from plugins.executors.sim import SimExecutor
from plugins.parallel.config import MeshConfig
from plugins.schedulers.order.fcfs import FirstCome

LIMITS = {"block_size": 4, "num_blocks": 24, "max_num_seqs": 6, "max_num_batched_tokens": 24}


class JitteryClock:
    """A wall clock made up: every reading moves it by chance, waits overshoot, steps end late."""

    def __init__(self, seed: int) -> None:
        self._rng, self._now = random.Random(seed), 0.0

    def now(self) -> float:
        self._now += self._rng.uniform(0.0001, 0.004)
        return self._now

    def advance_to(self, t: float) -> None:
        self._now = max(self._now, t + self._rng.uniform(0, 0.01))

    def wait_until(self, t: float, inbox: object) -> None:
        self.advance_to(t)


def small_shape(max_model_len: int = 64, vocab_size: int = 50) -> ModelShape:
    return ModelShape("LlamaForCausalLM", 16, 2, 4, 2, 4, 32, vocab_size, True, max_model_len)


def sim() -> SimExecutor:
    executor = SimExecutor()
    executor.prepare(small_shape(), Hardware())
    return executor


def oracle() -> OracleExecutor:
    return OracleExecutor(vocab_size=50, num_blocks=24)


def build(executor, max_inflight: int = 1, observers=(), **limits) -> Engine:
    return Engine(
        default_roles(executor=executor),
        EngineConfig(**{**LIMITS, **limits}, max_inflight=max_inflight),
        seed=3,
        observers=observers,
    )


class Chatter:
    """A closed loop: three sessions, each asks again 10 ms after an answer, with the answer in its next
    prompt."""

    def __init__(self, turns: int = 3) -> None:
        self.turns = turns

    def first(self) -> list[Arrival]:
        return [
            Arrival(0.002 * s, [s + 1] * (5 + s), SamplingParams(max_tokens=6), tags=Tags(session=str(s)))
            for s in range(4)
        ]

    def follow(self, request, now):
        if request.tags.turn + 1 < self.turns:
            tags = Tags(session=request.tags.session, turn=request.tags.turn + 1)
            yield Arrival(
                now + 0.01,
                [*request.token_ids, 7, 8, 9],
                SamplingParams(max_tokens=5),
                tags=tags,
                output_len=3 + tags.turn,
            )


def open_loop(seed: int = 1, n: int = 20) -> list[Arrival]:
    rng, t, arrivals = random.Random(seed), 0.0, []
    for _ in range(n):
        t += rng.expovariate(40)
        prompt = [rng.randrange(3) for _ in range(rng.randint(1, 30))]
        arrivals.append(
            Arrival(
                t, prompt, SamplingParams(max_tokens=rng.randint(1, 20)), output_len=rng.choice([None, 4])
            )
        )
    return arrivals


def run_recorded(tmp_path, max_inflight, arrivals, follow=None, executor=None):
    executor = executor or oracle()
    executor.clock = JitteryClock(9)
    engine = build(executor, max_inflight, observers=recording(tmp_path))
    return engine.run(arrivals, follow)


def replay(path, max_inflight, arrivals, follow=None):
    executor = Replay(str(path))
    executor.prepare()
    return build(executor, max_inflight).run(arrivals, follow)


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_a_jittery_run_replays_to_the_identical_decision_log(tmp_path, max_inflight):
    original = run_recorded(tmp_path, max_inflight, open_loop())
    again = replay(tmp_path, max_inflight, open_loop())
    assert original.num_preemptions > 0, "the case should be a hard one"
    assert again.decision_hash == original.decision_hash
    assert [o.output_token_ids for o in again.outputs] == [o.output_token_ids for o in original.outputs]
    assert [o.token_times for o in again.outputs] == [o.token_times for o in original.outputs]


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_a_closed_loop_replays_too(tmp_path, max_inflight):
    original = run_recorded(tmp_path, max_inflight, Chatter().first(), Chatter().follow)
    again = replay(tmp_path, max_inflight, Chatter().first(), Chatter().follow)
    assert len(original.outputs) == 12
    assert again.decision_hash == original.decision_hash
    assert [(o.id, o.arrival_time, o.finish_time) for o in again.outputs] == [
        (o.id, o.arrival_time, o.finish_time) for o in original.outputs
    ]


def test_two_wall_clock_runs_differ_so_that_the_replay_says_something(tmp_path):
    hashes = set()
    for seed in range(3):
        executor = oracle()
        executor.clock = JitteryClock(seed)
        hashes.add(build(executor).run(open_loop()).decision_hash)
    assert len(hashes) > 1


def test_a_run_that_differs_from_the_record_is_refused_at_the_step_where_it_shows(tmp_path):
    run_recorded(tmp_path, 1, open_loop(n=5))
    with pytest.raises(ReplayError, match=r"is not in .*replay\.npz|is not among|clock ends"):
        replay(tmp_path, 1, open_loop(n=20))


def test_a_run_that_waits_for_a_later_arrival_than_the_record_ends_instead_of_hanging(tmp_path):
    run_recorded(tmp_path, 1, [Arrival(0.0, [1, 2], SamplingParams(max_tokens=2))])
    with pytest.raises(ReplayError, match="the record's clock ends"):
        replay(
            tmp_path,
            1,
            [
                Arrival(0.0, [1, 2], SamplingParams(max_tokens=2)),
                Arrival(99.0, [1], SamplingParams(max_tokens=2)),
            ],
        )


def test_other_limits_than_the_records_are_refused_before_the_first_step(tmp_path):
    run_recorded(tmp_path, 1, open_loop(n=3))
    executor = Replay(str(tmp_path))
    executor.prepare()
    with pytest.raises(ConfigError, match="max_num_seqs=5.*recorded with 6"):
        build(executor, max_num_seqs=5)


@pytest.mark.parametrize("content", [None, b"nonsense"])
def test_a_missing_or_broken_record_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "replay.npz").write_bytes(content)
    with pytest.raises(ReplayError, match=r"replay\.npz"):
        Replay(str(tmp_path)).prepare()


@pytest.mark.parametrize("max_inflight", [1, 2])
@pytest.mark.parametrize("closed", [False, True])
def test_two_executors_under_the_same_step_times_take_the_same_decisions(tmp_path, max_inflight, closed):
    run_recorded(tmp_path, 1, open_loop())
    durations = Record.load(tmp_path).durations
    results = []
    for inner in (sim(), oracle()):
        arrivals, follow = (Chatter().first(), Chatter().follow) if closed else (open_loop(), None)
        results.append(build(RecordedTimes(inner, durations), max_inflight).run(arrivals, follow))
    assert results[0].decision_hash == results[1].decision_hash
    assert results[0].duration == results[1].duration > 0
    assert [o.output_token_ids for o in results[0].outputs] != [
        o.output_token_ids for o in results[1].outputs
    ], "tokens may differ, decisions not"


def test_the_cost_model_of_a_recorded_simulation_is_there_on_replay(tmp_path):
    executor = sim()
    build(executor, observers=recording(tmp_path)).run(open_loop(n=3))
    again = Replay(str(tmp_path))
    again.prepare()
    assert again.cost_model.step_time([3], [2]) == executor.cost_model.step_time([3], [2])
    assert again.caps == executor.caps


# ---- composed runs: everything the record knows is compared before the first step ------------------------


COMPOSITION: dict[str, tuple[str, dict]] = {
    **default_choices(),
    "workload": ("random", {"num_requests": 12, "input_len": [5, 40], "output_len": 6}),
}  # fmt: skip


def composed(executor: tuple[str, dict], *, directory=None, choices=None, **nodes):
    nodes = {"engine": EngineConfig(4, 64, 4, 16), "model": kit.SHAPE, "seed": 3} | nodes
    roles = {**COMPOSITION, "executor": executor, **(choices or {})}
    registry = load_registry()
    registry.add("executor", "talking", Talking)
    return compose(registry, Composition(roles, **nodes), directory=directory)


def workload(**changes) -> dict:
    return {"workload": ("random", COMPOSITION["workload"][1] | changes)}


@pytest.fixture(scope="module")
def pipelined(tmp_path_factory):
    """A record of two pipeline stages: two plans in flight, none of which may hold a request of the other."""
    directory = tmp_path_factory.mktemp("pipelined")
    return directory, composed(("sim", {}), directory=directory, parallel=MeshConfig(pp=2)).execute()


def test_a_pipeline_replays_to_its_own_hash(pipelined, tmp_path, capsys):
    directory, original = pipelined
    again = composed(
        ("replay", {"path": str(directory)}), directory=tmp_path, parallel=MeshConfig(pp=2)
    ).execute()
    assert again.decision_hash == original.decision_hash
    assert [o.token_times for o in again.outputs] == [o.token_times for o in original.outputs]
    said = capsys.readouterr().out
    assert "all as recorded" in said and f"decision hash {original.decision_hash}, as recorded" in said


OTHERWISE = {
    "one stage": (
        {"parallel": MeshConfig(), "engine": EngineConfig(4, 64, 4, 16, max_inflight=1)},
        r"engine.max_inflight=1, recorded with 2\n  parallel.pp=1, recorded with 2",
    ),
    "two ranks": ({"parallel": MeshConfig(tp=2, pp=2)}, "parallel.tp=2, recorded with 1"),
    "a seed": ({"seed": 4}, "seed=4, recorded with 3"),
    "an order": ({"choices": {"order": ("vtc", {})}}, 'order="vtc", recorded with "fcfs"\n[^ ]'),
    "a cache": ({"choices": {"cache": ("none", {})}}, 'cache="none", recorded with "hash"'),
    "a parameter": (
        {"choices": {"scheduler": ("chunked", {"token_budget": 8})}},
        "scheduler.token_budget=8, recorded with 16",
    ),
    "a further role": (
        {"choices": {"admission": ("always", {})}},
        'admission="always", recorded with absent',
    ),
    "fewer requests": ({"choices": workload(num_requests=11)}, "workload.num_requests=11, recorded with 12"),
    "more requests": ({"choices": workload(num_requests=13)}, "workload.num_requests=13, recorded with 12"),
    "fewer blocks": ({"engine": EngineConfig(4, 63, 4, 16)}, "engine.num_blocks=63, recorded with 64"),
    "larger blocks": ({"engine": EngineConfig(8, 64, 4, 16)}, "engine.block_size=8, recorded with 4"),
    "more in flight": (
        {"engine": EngineConfig(4, 64, 4, 16, max_inflight=4)},
        "engine.max_inflight=4, recorded with 2",
    ),
    "a shorter context": (
        {"engine": EngineConfig(4, 64, 4, 16, max_model_len=99)},
        "engine.max_model_len=99, recorded with 256",
    ),
    "a shape": (
        {"model": replace(kit.SHAPE, num_hidden_layers=4)},
        "model.num_hidden_layers=4, recorded with 2",
    ),
    "hardware": ({"hardware": Hardware(memory_gb=1.0)}, "hardware.memory_gb=1.0, recorded with 139.8"),
    "targets": ({"slo": SLO(ttft=1.0)}, "slo.ttft=1.0, recorded with null"),
}


@pytest.mark.parametrize("otherwise, named", OTHERWISE.values(), ids=OTHERWISE)
def test_what_is_not_as_recorded_is_refused_by_name_before_the_first_step(pipelined, otherwise, named):
    with pytest.raises(ReplayError, match=f"this run is not the recorded one:\n(  .*\n)*  {named}"):
        composed(("replay", {"path": str(pipelined[0])}), **{"parallel": MeshConfig(pp=2)} | otherwise)


def test_a_sweep_hears_of_another_run_before_its_first_job(pipelined):
    choices = {**COMPOSITION, "executor": ("replay", {"path": str(pipelined[0])})}
    other = Composition(choices, EngineConfig(4, 64, 4, 16), kit.SHAPE, parallel=MeshConfig(pp=2), seed=4)
    with pytest.raises(ReplayError, match="seed=4, recorded with 3"):
        check(load_registry(), other)


def test_what_decides_nothing_may_differ(pipelined):
    # the number of blocks is left to the executor, which takes the record's
    limits = EngineConfig(4, None, 4, 16, check=True)
    run = composed(
        ("replay", {"path": str(pipelined[0])}), engine=limits, parallel=MeshConfig(pp=2, timeout=99)
    )
    assert run.execute().decision_hash == pipelined[1].decision_hash


def test_another_run_in_a_records_step_times_is_asked_for_by_name_and_says_what_differs(
    pipelined, tmp_path, capsys
):
    choices = {"order": ("vtc", {})}
    run = composed(
        ("replay", {"path": str(pipelined[0]), "inner": "sim"}), directory=tmp_path, choices=choices, seed=9
    )
    assert len(run.execute().outputs) == 12
    said = capsys.readouterr().out
    assert (
        "a run of its own, no replay. Differences:" in said
        and 'order="vtc", recorded with "fcfs"' in said
        and "seed=9, recorded with 3" in said
    )


def test_a_replay_in_the_records_own_directory_does_not_write_over_it(tmp_path):
    composed(("sim", {}), directory=tmp_path).execute()
    before = (tmp_path / "replay.npz").read_bytes()
    composed(("replay", {"path": str(tmp_path)}), directory=tmp_path).execute()
    assert (tmp_path / "replay.npz").read_bytes() == before


def test_a_trace_that_was_edited_since_is_noticed(tmp_path):
    trace = tmp_path / "trace.csv"
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 12:00:00,30,4\n2024-05-10 12:00:01,20,4\n"
    choices = {"workload": ("azure", {"path": str(trace)})}
    trace.write_text(text)
    composed(("sim", {}), directory=tmp_path, choices=choices).execute()
    for old, new, problem in (
        ("01,20", "01,21", "the prompt of request r1 is not that of .*: 21 tokens, recorded with 20"),
        (
            "00:01",
            "00:02",
            "request r1 does not arrive as in .*2.000000 s, recorded at 1.000000 s|clock ends",
        ),
    ):
        trace.write_text(text.replace(old, new))
        with pytest.raises(ReplayError, match=problem):
            composed(("replay", {"path": str(tmp_path)}), choices=choices).execute()


class Letters:
    """A tokenizer of the least kind."""

    has_chat_template = False

    def encode(self, text):
        if "unspeakable" in text:
            raise ModelError("there are no words for it")
        return [ord(letter) % 50 for letter in text]

    def answer(self, prompt_token_ids, output):
        return " ".join(map(str, output.output_token_ids))


@dataclass
class Talking(SimExecutor):
    """A simulation that has texts, as a real model has."""

    tokenizer = Letters()


def test_a_chat_replays_without_its_model_and_answers_as_it_did(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\nthe unspeakable\nthree\n")
    parameters = {"path": str(tmp_path / "prompts.txt"), "max_tokens": 4, "system": "Be brief."}
    choices = {"workload": ("chat", parameters)}
    about = {"choices": choices, "engine": EngineConfig(16, 200, 4, 512)}
    original = composed(("talking", {}), directory=tmp_path, **about).execute()
    run = composed(("replay", {"path": str(tmp_path)}), **about)
    again = run.execute()
    assert again.decision_hash == original.decision_hash
    assert [o.output_token_ids for o in again.outputs] == [o.output_token_ids for o in original.outputs]
    assert [(o.prompt, o.finish_reason) for o in again.outputs] == [
        (o.prompt, o.finish_reason) for o in original.outputs
    ]
    assert [o.state for o in again.outputs] == ["finished", "rejected", "finished"]
    assert again.outputs[1].finish_reason == "there are no words for it"
    output = original.outputs[0]
    assert (
        run.engine.executor.tokenizer.answer(output.prompt_token_ids, output)
        == Letters().answer([], output)
        != ""
    )
    with pytest.raises(ReplayError, match="the prompt 'other' is not in"):
        run.engine.executor.tokenizer.encode("other")


def test_an_answer_that_a_stop_string_ended_ends_there_again(tmp_path):
    def engine(executor, stop_text, observers=()):
        return Engine(
            default_roles(executor=executor), EngineConfig(**LIMITS), stop_text=stop_text, observers=observers
        )

    def stops_at_three(request):
        return TextStop("as it was", "anything") if request.num_output_tokens == 3 else None

    sampling = SamplingParams(max_tokens=9, stop=("anything",))
    arrivals = [Arrival(0.0, Letters().encode(text), sampling, prompt=text) for text in ("one", "two")]
    executor = oracle()
    executor.tokenizer = Letters()
    original = engine(executor, stops_at_three, recording(tmp_path)).run(arrivals)
    again = Replay(str(tmp_path))
    again.prepare()
    repeated = engine(again, again.stop_text).run(arrivals)
    assert repeated.decision_hash == original.decision_hash
    ends = [(o.finish_reason, o.stop_reason, o.text, o.output_token_ids) for o in original.outputs]
    assert [(o.finish_reason, o.stop_reason, o.text, o.output_token_ids) for o in repeated.outputs] == ends
    assert [end[:3] for end in ends] == [("stop", "anything", "as it was")] * 2


# ---- engines built by hand: what they decide is compared, step by step -----------------------------------


def by_hand(path, arrivals, order=None, seed=3):
    executor = Replay(str(path))
    executor.prepare()
    roles = default_roles(executor=executor, **({} if order is None else {"order": order}))
    return Engine(roles, EngineConfig(**LIMITS), seed=seed, observers=[Verifier(executor)])


def test_the_first_other_decision_is_named_by_its_step_and_by_what_it_is(tmp_path):
    arrivals = [Arrival(0.0, [i] * (20 + i), SamplingParams(max_tokens=3)) for i in range(4)]
    run_recorded(tmp_path, 1, arrivals)

    class LastCome(FirstCome):
        def order(self, view):
            return reversed(view.waiting)

    with pytest.raises(
        ReplayError,
        match=r"step 0 is not that of .*as many planned requests as in the record \(2\), but others. "
        r"Planned here: r3\[0:23\]",
    ):
        by_hand(tmp_path, arrivals, LastCome()).run(arrivals)


@pytest.mark.parametrize(
    "changed, problem",
    [
        ({"prompt_token_ids": [9] * 20}, "step 0: the prompt of request r0 .* as long, but other tokens"),
        ({"prompt_token_ids": [0] * 19}, "step 0: the prompt of request r0 .* 19 tokens, recorded with 20"),
        ({"id": "other"}, "step 0: request other is not in"),
    ],
)
def test_a_request_that_is_not_the_recorded_one_is_named(tmp_path, changed, problem):
    arrivals = [Arrival(0.0, [i] * 20, SamplingParams(max_tokens=3)) for i in range(2)]
    run_recorded(tmp_path, 1, arrivals)
    with pytest.raises(ReplayError, match=problem):
        by_hand(tmp_path, arrivals).run([replace(arrivals[0], **changed), arrivals[1]])


def test_a_request_that_arrives_at_another_time_is_named(tmp_path):
    arrivals = [Arrival(0.25 * i, [i] * 20, SamplingParams(max_tokens=3)) for i in range(2)]
    run_recorded(tmp_path, 1, arrivals)
    with pytest.raises(
        ReplayError, match="request r1 does not arrive as in .*0.125000 s, recorded at 0.250000 s|clock ends"
    ):
        by_hand(tmp_path, arrivals).run([arrivals[0], replace(arrivals[1], time=0.125)])


def test_requests_that_no_step_shows_are_compared_at_the_end(tmp_path):
    refused = Arrival(0.0, [1] * 99, id="too long")
    arrivals = [Arrival(0.0, [1] * 20, SamplingParams(max_tokens=3), id="a")]
    run_recorded(tmp_path, 1, [*arrivals, refused])
    assert by_hand(tmp_path, arrivals).run([*arrivals, refused]).status == "finished"
    with pytest.raises(ReplayError, match="1 requests here, 2 in .*too long is in one of them only"):
        by_hand(tmp_path, arrivals).run(arrivals)


def test_the_decision_hash_is_compared_at_the_end(tmp_path):
    arrivals = [Arrival(0.0, [1] * 20, SamplingParams(max_tokens=3))]
    run_recorded(tmp_path, 1, arrivals)
    rewrite(tmp_path, meta=lambda meta: meta | {"decision_hash": "another"})
    with pytest.raises(ReplayError, match="decision hash .* recorded in .* with another"):
        by_hand(tmp_path, arrivals).run(arrivals)


def test_an_engine_of_another_seed_is_refused(tmp_path):
    run_recorded(tmp_path, 1, open_loop(n=2))
    with pytest.raises(ConfigError, match="seed=4, .*recorded with 3"):
        by_hand(tmp_path, [], seed=4)


# ---- records that are none -------------------------------------------------------------------------------


def rewrite(directory, **changes) -> None:
    """Edits arrays of a record by name; `meta` as the object it holds."""
    with np.load(directory / "replay.npz", allow_pickle=True) as data:
        arrays = dict(data)
    for name, change in changes.items():
        if change is None:
            del arrays[name]
        elif name == "meta":
            arrays[name] = np.array(json.dumps(change(json.loads(str(arrays[name])))))
        else:
            arrays[name] = change(arrays[name])
    np.savez_compressed(directory / "replay.npz", **arrays)


DAMAGED = {
    "an older format": ({"meta": lambda meta: {"format": 1}}, "format 1, expected 4: record the run again"),
    "no object": ({"meta": lambda meta: [1]}, "is no record of a run"),
    "facts left out": (
        {"meta": lambda meta: {k: v for k, v in meta.items() if k != "facts"}},
        "is no record of a run .*'facts'",
    ),
    "a field that no shape has": (
        {"meta": lambda meta: meta | {"caps": meta["caps"] | {"more": 1}}},
        "is no record of this version",
    ),
    "limits left out": ({"meta": lambda meta: meta | {"limits": {"num_blocks": 3}}}, "its limits are"),
    "a composition of another kind": (
        {"meta": lambda meta: meta | {"facts": ["a"]}},
        "its composition is no table",
    ),
    "an array left out": ({"plans": None}, "is no record of a run"),
    "a pickled object": (
        {"ids": lambda ids: np.array([{}] * len(ids), dtype=object)},
        "is no record of a run .*allow_pickle=False",
    ),
    "times that are none": ({"start": lambda start: start * np.nan}, "times that are no finite numbers"),
    "plans of another kind": ({"plans": lambda plans: plans[:, :3]}, "its plans have another shape"),
    "a step too few": ({"end": lambda end: end[:-1]}, "is no record of a run"),
    "offsets past the tokens": (
        {"offsets": lambda offsets: offsets + 1},
        "its tokens and its requests do not match",
    ),
}


@pytest.mark.parametrize("changes, problem", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_refused_by_what_is_wrong_with_it(tmp_path, changes, problem):
    run_recorded(tmp_path, 1, open_loop(n=3))
    rewrite(tmp_path, **changes)
    with pytest.raises(ReplayError, match=rf"replay\.npz: .*{problem}"):
        Replay(str(tmp_path)).prepare()


def test_a_record_that_was_cut_off_is_refused(tmp_path):
    run_recorded(tmp_path, 1, open_loop(n=3))
    whole = (tmp_path / "replay.npz").read_bytes()
    for end in (10, len(whole) // 2, len(whole) - 3):
        (tmp_path / "replay.npz").write_bytes(whole[:end])
        with pytest.raises(ReplayError, match="is no record of a run"):
            Replay(str(tmp_path)).prepare()


def test_a_record_without_a_composition_cannot_be_replayed_by_one(tmp_path):
    run_recorded(tmp_path, 1, open_loop(n=3))
    with pytest.raises(ReplayError, match="does not hold its run's composition"):
        composed(("replay", {"path": str(tmp_path)}))
