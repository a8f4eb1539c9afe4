"""Measured step times: what is fitted, what is refused, and that the simulator runs on them."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from core.testing import kit
from experiments import calibrate
from headway import ConfigError, Hardware
from plugins.executors import profile as profiles
from plugins.executors.cost import restored, stored
from plugins.executors.profile import Profile, Terms, features
from plugins.executors.sim import SimExecutor

SHAPE = kit.SHAPE.shape()
DECODE = Terms(0.004, [0, 64], [1e-6, 2e-5], 1e-6, 3e-8, 0.0, 0.0)
MIXED = Terms(0.005, [0, 256], [2e-6, 3e-5], 2e-6, 3e-8, 1e-8, 5e-10)


def profile(**changed) -> Profile:
    found = Profile(
        hardware="h100",
        shape=asdict(SHAPE),
        tp=1,
        pp=1,
        decode=DECODE,
        mixed=MIXED,
        error={"decode": {"p50": 0.01, "p90": 0.02}, "mixed": {"p50": 0.02, "p90": 0.04}},
        made={"device": "a GPU"},
    )
    return replace(found, **changed)


def steps(count: int, noise: float, seed: int = 0) -> list[calibrate.Sample]:
    """Steps of prompts beside decodes that take what MIXED says, times noise."""
    rng, found = Random(seed), []
    for _ in range(count):
        decodes = rng.randrange(0, 200)
        lengths = [1] * decodes + [int(2 ** rng.uniform(1, 11)) for _ in range(rng.randint(1, 3))]
        starts = [rng.randrange(2000) for _ in lengths]
        found.append((starts, lengths, MIXED.seconds(starts, lengths) * rng.uniform(1 - noise, 1 + noise)))
    return found


@pytest.mark.parametrize(("noise", "bound"), [(0.0, 0.002), (0.05, 0.035)])
def test_a_fit_predicts_steps_that_it_has_not_seen_as_well_as_their_noise_allows(noise, bound):
    terms, error = calibrate.fitted(steps(400, noise), [])
    assert error["p50"] < bound
    off = [abs(terms.seconds(s, n) / MIXED.seconds(s, n) - 1) for s, n, _ in steps(100, 0.0, seed=1)]
    assert np.median(off) < bound


def test_steps_that_something_else_stretched_are_left_out_and_counted():
    clean = steps(400, 0.01)
    disturbed = [(s, n, seconds * (5 if i % 20 == 0 else 1)) for i, (s, n, seconds) in enumerate(clean)]
    terms, error = calibrate.fitted(disturbed, [])
    assert error["disturbed"] >= 20 and error["p90"] < 0.03
    assert terms.seconds([100] * 50, [1] * 49 + [500]) == pytest.approx(
        MIXED.seconds([100] * 50, [1] * 49 + [500]), rel=0.03
    )


def test_the_size_of_a_graph_is_what_a_step_pays_for():
    padding = replace(MIXED, sizes=[512, 1024])
    more = (1024 - 513) * (2e-6 + 3e-5)
    assert padding.seconds([0], [513]) == pytest.approx(MIXED.seconds([0], [513]) + more)
    assert padding.seconds([0], [1025]) == MIXED.seconds([0], [1025])


chunks = st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 3000)), min_size=1, max_size=20)


@given(chunks, st.integers(0, 19))
def test_more_work_never_makes_a_step_shorter(chunks, at):
    """A step with prompts, and the same with one chunk longer or later, or one chunk more."""
    chunks = [(0, 2), *chunks]
    at %= len(chunks)
    start, length = chunks[at]
    seconds = lambda chunks: MIXED.seconds(*zip(*chunks, strict=True))  # noqa: E731
    longer = [*chunks[:at], (start, length + 1 if length > 1 else 1), *chunks[at + 1 :]]
    later = [*chunks[:at], (start + 1, length), *chunks[at + 1 :]]
    assert min(map(seconds, (longer, later, [*chunks, (7, 3)]))) >= seconds(chunks)


def test_features_count_each_query_key_pair_once():
    assert features([10, 4], [1, 3]) == (4, 2, 11, 7, 4 + 1 + 4 + 2 + 4 + 3)


def test_a_profile_is_the_same_after_it_was_written(tmp_path):
    profiles.write(profile(), tmp_path / "p.yaml")
    assert profiles.read(tmp_path / "p.yaml") == profile()
    assert restored(SHAPE, stored(profile())) == profile()


def simulator(path: Path | str, **changed) -> SimExecutor:
    executor = SimExecutor(profile=str(path))
    executor.prepare(SHAPE, Hardware(name="h100"), **changed)
    return executor


def test_the_simulator_takes_its_step_times_from_a_profile_and_says_so(tmp_path):
    profiles.write(profile(), tmp_path / "p.yaml")
    executor = simulator(tmp_path / "p.yaml")
    assert executor.cost_model.step_time([5, 6], [1, 1]) == DECODE.seconds([5, 6], [1, 1])
    assert (
        executor.step_time_basis
        == "profile of a GPU, tp=1 pp=1, off by decode steps 1.0% (P90 2.0%), mixed steps 2.0% (P90 4.0%)"
    )


def test_a_shipped_profile_is_found_by_itself_and_none_means_the_roofline(tmp_path, monkeypatch):
    monkeypatch.setattr("plugins.executors.sim.PROFILES", tmp_path)
    assert simulator("auto").time_model.error is None, "nobody measured that of this card's roofline"
    assert "roofline" in simulator("auto").step_time_basis
    profiles.write(profile(tp=2), tmp_path / "two.yaml")
    assert "roofline" in simulator("auto").step_time_basis
    profiles.write(profile(), tmp_path / "one.yaml")
    assert "profile" in simulator("auto").step_time_basis
    assert "roofline" in simulator("none").step_time_basis
    assert "roofline" in simulator("auto", pp=2).step_time_basis


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hardware": "a100"}, "it is of hardware a100, the run has h100"),
        ({"tp": 2}, "it is of parallel.tp 2, the run has 1"),
        (
            {"shape": asdict(SHAPE) | {"hidden_size": 99}},
            "it is of model shape hidden_size=99, the run has hidden_size=64",
        ),
    ],
)
def test_a_profile_of_another_run_is_refused_with_what_differs(tmp_path, changed, message):
    profiles.write(profile(**changed), tmp_path / "p.yaml")
    with pytest.raises(ConfigError, match=message):
        simulator(tmp_path / "p.yaml")


@pytest.mark.parametrize("damage", ["", "7", "[]", "format: 2", "no_slopes", "negative"])
def test_what_is_no_profile_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "p.yaml"
    profiles.write(profile(), path)
    found = yaml.safe_load(path.read_text())
    if damage == "no_slopes":
        del found["mixed"]["slopes"]
    elif damage == "negative":
        found["decode"]["floor"] = -1.0
    path.write_text(yaml.safe_dump(found) if damage in ("no_slopes", "negative") else damage)
    with pytest.raises(ConfigError, match="p.yaml: is no profile of step times"):
        simulator(path)
    with pytest.raises(ConfigError, match="missing.yaml: is no profile of step times"):
        simulator(tmp_path / "missing.yaml")


def test_calibration_of_a_machine_whose_times_are_known_finds_them(capsys):
    """executor=sim is the machine here, with the roofline for a clock."""
    words = [
        "executor=sim",
        "executor.profile=none",
        "model=qwen3_8b",
        "hardware=h200",
        "engine.max_num_seqs=16",
        "engine.num_blocks=4000",
    ]
    found = calibrate.calibrate(words, repeats=1)
    assert (
        found.hardware == "h200"
        and found.error["decode"]["p90"] < 0.005
        and found.error["mixed"]["p50"] < 0.02
    )
    assert "repeat 1: 16 decode at 64" in capsys.readouterr().err
