"""The compiled twin of a simulated run: the same decisions, times, answers and files as the engine's, to
the bit."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.native_runs import (
    MEASURED,
    SHAPE,
    SLOW,
    Given,
    Seen,
    arrivals_of,
    case_of,
    observed,
    random_choices,
    registry,
    run_case,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from core.chains import chain_key
from core.compose.build import Composition, build
from core.compose.config import EngineConfig
from core.compose.defaults import default_choices
from core.errors import ConfigError
from core.inputs import Arrival, SamplingParams
from core.measure import step_log
from core.measure.metrics import summarize
from core.policy import ROLES
from headway import Observer, hookimpl
from plugins.native import followed, library, twins
from plugins.workloads.content import Content, Prompt

SEEDS = 300


@pytest.fixture(scope="module", autouse=True)
def built(tmp_path_factory):
    """The library, compiled into a folder of these tests; without a compiler there is nothing to test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(library.FOLDER, str(tmp_path_factory.mktemp("native")))
        if problem := library.build():
            pytest.skip(problem)
        yield


@pytest.fixture(scope="module")
def found():
    return registry()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("read")


def small(found, arrivals, native="always", observers=(), directory=None, **choices):
    """A run of `arrivals` in a pool that is large enough."""
    Given.made["now"] = arrivals
    choices = {"executor": "sim", "workload": ("given", {"key": "now"})} | choices
    roles = default_choices(**choices)
    composition = Composition(roles, EngineConfig(4, 100, native=native), SHAPE, SLOW)
    return build(found, composition, observers, directory=directory)


def ask(id: str, time: float = 0.0, prompt=(1, 2, 3, 4, 5, 6), answer: int = 4) -> Arrival:
    return Arrival(time, prompt, SamplingParams(max_tokens=answer), id=id)


def both(found, arrivals, **choices) -> tuple[Seen, Seen]:
    """What Python and the twin make of them; `arrivals` makes them anew for each."""
    python, native = (observed(small(found, arrivals(), native, **choices)) for native in ("never", "always"))
    assert (python.loop, native.loop) == ("python", "native")
    return python, native


# ---- the same to the bit -------------------------------------------------------------------------------


def test_random_runs_are_the_same_in_both(found, folder) -> None:
    happened = dict.fromkeys(
        (
            "preemptions",
            "evictions",
            "cached",
            "recomputed",
            "rejected",
            "stopped",
            "in flight 2+",
            "no placeholders",
            "measured",
        ),
        0,
    )
    for seed in range(SEEDS):
        python, native = run_case(found, seed, "never", folder), run_case(found, seed, "always", folder)
        assert python.differences(native) == [], f"seed {seed}: {case_of(seed)}"
        assert (python.loop, native.loop) == ("python", "native")
        outputs, case = python.result["outputs"], case_of(seed)
        happened["preemptions"] += python.result["num_preemptions"]
        happened["evictions"] += python.result["num_evictions"]
        happened["cached"] += sum(o.num_cached_tokens for o in outputs)
        happened["recomputed"] += sum(o.num_recomputed_tokens for o in outputs)
        happened["rejected"] += sum(o.state == "rejected" for o in outputs)
        happened["stopped"] += sum(o.stop_reason is not None for o in outputs)
        happened["in flight 2+"] += case.max_inflight > 1
        happened["no placeholders"] += not case.placeholders
        happened["measured"] += python.result["time_model"].name.startswith("profile")
    assert all(happened.values()), happened


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(SEEDS, 10**12))
def test_any_run_is_the_same_in_both(found, folder, seed: int) -> None:
    assert run_case(found, seed, "never", folder).differences(run_case(found, seed, "always", folder)) == []


def test_the_keys_of_blocks_are_those_of_the_python_cache() -> None:
    rng, native = random.Random(0), library.load()
    for _ in range(500):
        parent = rng.choice([0, -1, -2, 2**61 - 1, 1 - 2**61, rng.randrange(-(2**63), 2**63)])
        tokens = tuple(rng.randrange(2**24) for _ in range(rng.randint(1, 40)))
        assert native.headway_chain_key(
            parent, (ctypes.c_int32 * len(tokens))(*tokens), len(tokens)
        ) == chain_key(parent, tokens)


#: A line of the source -> what it becomes: a bug in one decision, and one in the last bit of a time.
PLANTED = {
    "eviction": ("pool.h", "push({block.last_access, id});", "push({~block.last_access, id});"),
    "times": (
        "roofline.h",
        "linear + attention + cost_.layers + reduces",
        "linear + (attention + (cost_.layers + reduces))",
    ),
    "hash": ("log.h", "int64_t(evicted.size()), 0}", "int64_t(evicted.size()), 1}"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_bug_in_the_twin_is_found(found, folder, bug: str, tmp_path: Path, monkeypatch) -> None:
    file, line, wrong = PLANTED[bug]
    source = tmp_path / "source"
    shutil.copytree(library.SOURCE, source)
    text = (source / file).read_text()
    assert text.count(line) == 1
    (source / file).write_text(text.replace(line, wrong))
    if bug == "eviction":  # the twin's own check of the heap would stop it
        pool = (source / file).read_text()
        (source / file).write_text(pool.replace("blocks[entry.second].last_access == entry.first", "true"))
    made = tmp_path / "wrong.so"
    compiler = os.environ.get("CXX") or next(filter(shutil.which, library.COMPILERS))
    subprocess.run(
        [*compiler.split(), *library.OPTIONS, "-O0", str(source / "headway.cpp"), "-o", str(made)], check=True
    )
    monkeypatch.setattr(library, "path", lambda: made)
    differ = [
        run_case(found, seed, "never", folder).differences(run_case(found, seed, "always", folder))
        for seed in range(40)
    ]
    expected = {"eviction": "result.decision_hash", "times": "readings", "hash": "result.decision_hash"}[bug]
    assert any(expected in names for names in differ), differ


def test_the_comparison_sees_every_part(found, folder) -> None:
    seen = run_case(found, 1, "always", folder)
    for name in seen.result.keys() - set(MEASURED):
        assert seen.differences(dataclasses.replace(seen, result=seen.result | {name: "another"})) == [
            f"result.{name}"
        ]
    assert seen.differences(dataclasses.replace(seen, readings=[])) == ["readings"]
    assert seen.differences(dataclasses.replace(seen, steps=[])) == ["steps"]
    assert seen.differences(dataclasses.replace(seen, error="late")) == ["error"]


# ---- which one runs ------------------------------------------------------------------------------------

NO_TWIN = {
    "scheduler: scheduler=orca": {"scheduler": ("orca", {})},
    "order: order=sjf": {"order": ("sjf", {}), "predictor": ("oracle", {})},
    "victim: victim=newest.mode=drop_tail": {"victim": ("newest", {"mode": "drop_tail"})},
    "chunk: chunk=fixed": {"chunk": ("fixed", {})},
    "admission: admission=rpm": {"admission": ("rpm", {})},
    "predictor: predictor=constant": {"predictor": ("constant", {})},
    "cache: cache=radix": {"cache": ("radix", {})},
    "eviction: eviction=lfu": {"eviction": ("lfu", {})},
    "retention: retention=keep": {"retention": ("keep", {})},
    "executor: executor=oracle": {"executor": ("oracle", {"max_model_len": 64, "num_blocks": 100})},
    "closed loop": {
        "workload": ("random", {"arrival": "closed", "num_requests": 3, "input_len": 5, "output_len": 2})
    },
    "workload=multi_turn: asks again": {
        "workload": ("multi_turn", {"num_sessions": 1, "input_len": 5, "output_len": 2, "system_len": 2})
    },
}


def test_every_role_that_decides_is_asked_for_its_twin() -> None:
    """One that is not would run compiled, as if nobody had been chosen for it."""
    assert set(twins.TWINS) | {"kernels", "parallel", "workload", "tracking"} == set(ROLES)


@pytest.mark.parametrize("reason", NO_TWIN)
def test_a_role_without_a_twin_is_named_and_runs_in_python(found, reason: str) -> None:
    with pytest.raises(ConfigError, match="engine.native=always") as refused:
        small(found, [ask("a")], "always", **NO_TWIN[reason])
    assert reason in str(refused.value)
    assert small(found, [ask("a")], "auto", **NO_TWIN[reason]).execute().loop == "python"


def test_auto_takes_the_twin_and_the_summary_says_so(found) -> None:
    for native, loop in (("auto", "native"), ("always", "native"), ("never", "python")):
        assert summarize(small(found, [ask("a")], native).execute())["loop"] == loop


def test_every_twin_is_a_plugin_of_the_box(found) -> None:
    factories = {plugin.factory for plugin in found.plugins.values()}
    assert {kind for kinds in twins.TWINS.values() for kind in kinds if kind} <= factories


def test_every_file_that_a_twin_follows_is_as_noted() -> None:
    """One that changed keeps runs in Python until this suite has compared both again."""
    followed.changed.cache_clear()
    assert not followed.changed(), "python -m plugins.native.followed, then this file's tests"
    classes = {kind for kinds in twins.TWINS.values() for kind in kinds if kind}
    assert {f"{kind.__module__.replace('.', '/')}.py" for kind in classes} <= set(followed.digests())


@pytest.mark.parametrize("edited", ["core/step.py", "plugins/schedulers/chunked.py"])
def test_an_edited_policy_runs_in_python(found, monkeypatch, edited: str) -> None:
    noted = followed.digests()
    monkeypatch.setattr(followed, "digests", lambda: noted | {edited: "another"})
    followed.changed.cache_clear()
    try:
        assert small(found, [ask("a")], "auto").execute().loop == "python"
        with pytest.raises(ConfigError, match=f"{edited} was edited"):
            small(found, [ask("a")], "always")
    finally:
        followed.changed.cache_clear()


def test_a_subclass_of_a_twin_has_none(found) -> None:
    run = small(found, [ask("a")], "auto")
    run.roles["order"].__class__ = type("Other", (type(run.roles["order"]),), {})
    assert "order" in twins.missing(run)


def test_a_parameter_that_the_twin_does_not_follow_keeps_the_run_in_python(found) -> None:
    run = small(found, [ask("a")], "auto", scheduler=("prefill_first", {"max_wait_tokens": 10}))
    assert "scheduler=prefill_first.max_wait_tokens=10 has no compiled twin" in twins.missing(run)


class Watching(Observer):
    plugin_name = "watching"

    def on_step(self, record) -> None:
        pass


def test_who_looks_at_every_step_gets_them_from_python(found) -> None:
    run = small(found, [ask("a")], "auto", [Watching()])
    assert twins.missing(run) == "watching: watches every step"
    assert run.execute().loop == "python"


def test_checked_pools_and_engines_that_have_run_stay_in_python(found) -> None:
    run = small(found, [ask("a")], "auto")
    run.engine.run([ask("b")])
    assert (
        twins.missing(run) == "executor: executor=sim with another cost model or clock has no compiled twin"
    )
    run = small(found, [ask("a")], "auto")
    run.engine.config.check = True
    assert "engine.check=true" in twins.missing(run)


def test_without_the_library_runs_stay_in_python(found, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(library.FOLDER, str(tmp_path))
    assert small(found, [ask("a")], "auto").execute().loop == "python"
    with pytest.raises(ConfigError, match="python -m plugins.native.build"):
        small(found, [ask("a")], "always")


def test_a_damaged_library_keeps_runs_in_python(found, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(library.FOLDER, str(tmp_path))
    library.path().write_text("no library")
    assert small(found, [ask("a")], "auto").execute().loop == "python"
    with pytest.raises(ConfigError, match="cannot be loaded"):
        small(found, [ask("a")], "always")


def test_without_a_compiler_the_build_says_so_and_with_a_broken_one_too(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(library.FOLDER, str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert library.build().startswith("no C++ compiler is found")
    monkeypatch.setenv("CXX", "false")
    assert library.build().startswith("false failed")
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    assert "nothing" in library.build()
    assert list(tmp_path.iterdir()) == []


def test_another_stand_in_may_come_from_a_plugin(found) -> None:
    class Module:
        @hookimpl
        def headway_stand_in(self, run):
            return "not on Sundays"

    other = registry()
    other.manager.register(Module())
    with pytest.raises(ConfigError, match="victim.*not on Sundays"):
        small(other, [ask("a")], victim=("oldest", {}))


# ---- what goes in --------------------------------------------------------------------------------------


def test_prompts_may_be_lists_arrays_or_made_when_asked(found) -> None:
    content = Content(0, 50)
    made = Prompt(content, (3, 4), 8, 13)
    prompts = [
        made,
        made.tolist(),
        np.array(made),
        tuple(made),
        np.array(made, np.int32),
        np.array([1.5]),
        np.array([60]),
    ]
    python, native = both(found, lambda: [ask(f"r{i}", i, prompt) for i, prompt in enumerate(prompts)])
    assert python.differences(native) == []
    assert [o.num_cached_tokens for o in native.result["outputs"]] == [0, 12, 12, 12, 12, 0, 0]
    assert [o.state for o in native.result["outputs"]][-3:] == ["finished", "rejected", "rejected"]


def test_a_prompt_made_when_asked_is_the_list_of_its_tokens() -> None:
    content = Content(1, 7)
    made = Prompt(content, (300, 5, 6), 20, 47)
    tokens = [t for id in (300, 5, 6) for t in content.tokens(id, 20)][:47]
    assert (
        made == tokens
        and list(made) == tokens
        and np.array(made).tolist() == tokens
        and made.tolist() == tokens
    )
    for cut in (
        slice(3, 9),
        slice(18, 41),
        slice(None, None, 3),
        slice(None, None, -1),
        slice(40, 99),
        slice(9, 3),
        slice(-4, None),
    ):
        assert made[cut] == tokens[cut]
    assert made[20] == tokens[20] and made[-1] == tokens[-1]
    with pytest.raises(IndexError):
        made[47]


def test_a_stream_that_goes_wrong_ends_both_at_the_same_point(found) -> None:
    def arrivals():
        yield from (ask(f"r{i}", 0.01 * i) for i in range(5))
        yield ask("late", 0.0)

    python, native = both(found, arrivals)
    assert "in order of time" in python.error
    assert python.differences(native) == []
    assert [o.state for o in native.result["outputs"]].count("aborted") > 0


def test_a_list_is_sorted_and_ids_are_given_as_in_python(found) -> None:
    python, native = both(
        found, lambda: [ask("b", 2.0), ask(None, 1.0), ask("r0", 0.5), ask("b", 0.0), ask(None, 3.0)]
    )
    assert python.differences(native) == []
    assert [o.id for o in native.result["outputs"]] == ["b", "r0", "r2", "b", "r4"]


# ---- what comes out ------------------------------------------------------------------------------------


def test_files_are_the_same(found, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(step_log, "MOST_STEPS", 7)  # several pieces
    arrivals = arrivals_of(case_of(3), random.Random(3))
    for native in ("never", "always"):
        (tmp_path / native).mkdir()
        result = small(found, arrivals, native, directory=tmp_path / native).execute()
        assert result.num_steps > 7
    python, native = tmp_path / "never", tmp_path / "always"
    assert (
        {f.name for f in python.iterdir()}
        == {f.name for f in native.iterdir()}
        >= {"timeline.json", "replay.npz"}
    )
    assert json.loads((python / "timeline.json").read_text()) == json.loads(
        (native / "timeline.json").read_text()
    )
    for name in ("requests.parquet", "steps.parquet", "decisions.parquet"):
        mine, theirs = pq.read_table(python / name), pq.read_table(native / name)
        columns = [column for column in mine.column_names if column != "policy_time"]
        assert mine.select(columns).equals(theirs.select(columns)), name
        assert pq.ParquetFile(python / name).num_row_groups == pq.ParquetFile(native / name).num_row_groups
    with np.load(python / "replay.npz") as mine, np.load(native / "replay.npz") as theirs:
        assert all(mine[name].tobytes() == theirs[name].tobytes() for name in mine.files if name != "meta")
        facts = [json.loads(str(data["meta"])) for data in (mine, theirs)]
    for meta in facts:
        del meta["facts"]["engine.native"]
    assert facts[0] == facts[1]


def test_a_record_of_the_twin_replays(found, tmp_path) -> None:
    choices = {"workload": ("random", {"num_requests": 5, "input_len": [3, 9], "output_len": 3})}
    recorded = small(found, [], directory=tmp_path, **choices).execute()
    assert recorded.loop == "native"
    replayed = small(found, [], "auto", executor=("replay", {"path": str(tmp_path)}), **choices).execute()
    assert (replayed.decision_hash, replayed.loop) == (recorded.decision_hash, "python")


class Heard(Observer):
    """Hears of requests, and of many steps at once; `then` is called with the engine the first time."""

    def __init__(self, then=lambda engine: None) -> None:
        self.ended, self.steps, self._then = [], [], then

    def on_start(self, engine) -> None:
        self._engine = engine

    def on_requests(self, finished) -> None:
        self.ended += finished

    def on_step(self, record) -> None:
        raise AssertionError("the twin tells of many steps at once")

    def on_steps(self, steps) -> None:
        self.steps += steps.numbers["step"].tolist()
        then, self._then = self._then, lambda engine: None
        then(self._engine)


def test_observers_hear_of_every_request_and_of_steps_in_pieces(found, monkeypatch) -> None:
    monkeypatch.setattr(step_log, "MOST_STEPS", 3)
    heard = Heard()
    result = small(found, [ask("a"), ask("b", prompt=[]), ask("c", 0.5)], observers=[heard]).execute()
    assert heard.steps == list(range(result.num_steps))
    assert sorted(r.id for r in heard.ended) == ["a", "b", "c"]
    for request, output in zip(sorted(heard.ended, key=lambda r: r.index), result.outputs, strict=True):
        assert request.token_ids == [*request.prompt_token_ids, *output.output_token_ids]
        assert (request.num_output_tokens, request.state.value) == (len(output.token_times), output.state)


def test_an_interrupt_keeps_what_was_done(found, monkeypatch) -> None:
    monkeypatch.setattr(step_log, "MOST_STEPS", 3)

    def interrupt(engine) -> None:
        raise KeyboardInterrupt

    arrivals = [ask(f"r{i}", 0.02 * i) for i in range(40)]
    whole = {o.id: o for o in small(found, arrivals).execute().outputs}
    result = small(found, arrivals, observers=[Heard(interrupt)]).execute()
    assert result.status == "interrupted" and 0 < len(result.outputs) < 40
    assert {o.state for o in result.outputs} == {"aborted"} and result.outputs[
        0
    ].finish_reason == "interrupted"
    for output in result.outputs:
        count = len(output.token_times)
        assert (
            output.token_times == whole[output.id].token_times[:count]
            and output.output_token_ids == whole[output.id].output_token_ids[:count]
        )


def test_an_observer_that_fails_ends_the_run_with_what_there_is(found, monkeypatch) -> None:
    monkeypatch.setattr(step_log, "MOST_STEPS", 3)
    with pytest.raises(Exception, match="ZeroDivisionError") as failed:
        small(found, [ask("a"), ask("b", 5.0)], observers=[Heard(lambda engine: 1 // 0)]).execute()
    partial = failed.value.partial
    assert (partial.status, partial.loop, [o.state for o in partial.outputs]) == (
        "failed",
        "native",
        ["aborted"],
    )


def test_a_request_can_be_aborted_before_and_after_it_arrives(found, monkeypatch) -> None:
    monkeypatch.setattr(step_log, "MOST_STEPS", 3)

    def abort(engine) -> None:
        for id in ("runs", "comes", "nobody"):
            engine.abort(id)

    arrivals = [ask("runs", answer=40), ask("stays", answer=40), ask("comes", 3.0)]
    result = small(found, arrivals, observers=[Heard(abort)]).execute()
    assert [(o.id, o.state, o.finish_reason) for o in result.outputs] == [
        ("runs", "aborted", "abort"),
        ("stays", "finished", "length"),
        ("comes", "aborted", "abort"),
    ]
    assert 0 < len(result.outputs[0].token_times) < 40 and not result.outputs[2].token_times


def test_the_choices_of_the_random_runs_have_twins(found) -> None:
    kinds = {json.dumps(random_choices(random.Random(seed))["scheduler"][0]) for seed in range(20)}
    assert kinds == {'"chunked"', '"prefill_first"', '"fcfs"'}
