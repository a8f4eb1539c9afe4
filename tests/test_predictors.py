"""Predictors: what they know, and how well they rank."""

from __future__ import annotations

from itertools import combinations
from random import Random

import pytest
from helpers.policy_runs import ask, compose, run

from core.compose.config import EngineConfig
from core.errors import ConfigError
from core.inputs import Arrival, SamplingParams
from core.keyed import KeyOrder


def waiting(arrivals: list, predictor, seed: int = 0):
    engine = compose(predictor=predictor, seed=seed)
    for a in arrivals:
        engine.add(a)
    engine._ingest(0.0)
    return engine, list(engine.waiting)


def kendall_tau(pairs: list[tuple[float, float]]) -> float:
    """Concordant minus discordant, over pairs whose first values differ."""
    signs = [(a[0] - b[0]) * (a[1] - b[1]) for a, b in combinations(pairs, 2) if a[0] != b[0]]
    return sum((s > 0) - (s < 0) for s in signs) / len(signs)


LENGTHS = {
    "uniform": lambda rng: rng.randint(1, 1000),
    "log-normal": lambda rng: max(1, int(rng.lognormvariate(5, 1))),
    "two values": lambda rng: rng.choice([20, 400]),
}


@pytest.mark.parametrize("shape", LENGTHS)
@pytest.mark.parametrize("tau", [0.2, 0.5, 0.8])
def test_a_noisy_predictor_ranks_with_the_kendall_tau_it_is_given(shape, tau):
    rng = Random(0)
    engine, requests = waiting(
        [ask(0.0, 1, LENGTHS[shape](rng)) for _ in range(600)], ("noisy", {"tau": tau})
    )
    for request in requests[:64]:
        engine.roles.predictor.predict(request)  # it tunes itself on the first lengths
    pairs = [(engine.truth.output_len(r), engine.roles.predictor.predict(r).mean) for r in requests]
    assert kendall_tau(pairs) == pytest.approx(tau, abs=0.06)


def test_a_noisy_predictor_of_tau_one_is_the_oracle():
    asked = [ask(0.0, 1, n) for n in (7, 90, 11)]
    engine, requests = waiting(asked, ("noisy", {"tau": 1.0}))
    assert [engine.roles.predictor.predict(r).mean for r in requests] == [7, 90, 11]


def test_noise_belongs_to_the_request_and_the_seed_not_to_the_moment_of_asking():
    asked = [ask(0.0, 1, 100, f"r{i}") for i in range(8)] + [ask(0.0, 1, 50, "x")]
    engine, requests = waiting(asked, "noisy", seed=1)
    forward = {r.id: engine.roles.predictor.predict(r).mean for r in requests}
    engine.roles.predictor._logs.clear()
    again, requests = waiting(asked, "noisy", seed=1)
    for r in reversed(requests):
        again.roles.predictor.predict(r)
    noise = {r.id: again.roles.predictor._noise[r.index] for r in requests}
    assert noise == {r.id: engine.roles.predictor._noise[r.index] for r in requests}
    other, requests = waiting(asked, "noisy", seed=2)
    assert {r.id: other.roles.predictor.predict(r).mean for r in requests} != forward


def test_the_oracle_knows_hidden_lengths_caps_and_the_context():
    asked = [
        Arrival(0.0, [1] * 5, SamplingParams(max_tokens=None), output_len=33),
        Arrival(0.0, [1] * 5, SamplingParams(max_tokens=10), output_len=33),
        Arrival(0.0, [1] * 5, SamplingParams(max_tokens=None)),
    ]
    engine, requests = waiting(asked, "oracle")
    assert [engine.roles.predictor.predict(r).mean for r in requests] == [33, 10, engine.max_model_len - 5]


def test_only_those_who_see_the_truth_are_stamped():
    asked = [ask(0.0, 1, 3)]
    stamps = {
        p: run(asked, predictor=p, order="sjf").saw_truth for p in ("oracle", "noisy", "history", "constant")
    }
    assert stamps == {
        "oracle": ["predictor=oracle"],
        "noisy": ["predictor=noisy"],
        "history": [],
        "constant": [],
    }


def test_constant_is_capped_by_what_a_request_may_generate():
    asked = [Arrival(0.0, [1], SamplingParams(max_tokens=m)) for m in (8, None)]
    engine, requests = waiting(asked, ("constant", {"length": 50.0}))
    assert [engine.roles.predictor.predict(r).mean for r in requests] == [8, 50]


# ---- history ---------------------------------------------------------------------------------------------


def learned(parameters: dict, lengths: list[tuple[str, int]], **tags):
    """A history after requests of these (category, length), and a request that waits."""
    engine = compose(predictor=("history", parameters), engine=EngineConfig(max_num_seqs=64))
    engine.run([ask(0.0, 1, n, category=c, client=c) for c, n in lengths])
    engine.add(ask(engine.clock.inner.now(), 1, 5, "asked", **tags))
    engine._ingest(engine.clock.inner.now())
    return engine, next(iter(engine.waiting))


def test_history_keeps_categories_apart():
    lengths = [("chat", n) for n in (10, 20, 30)] + [("code", n) for n in (100, 200)]
    for by, tags in (("category", {"category": "chat"}), ("client", {"client": "chat"})):
        engine, request = learned({"by": by}, lengths, **tags)
        assert engine.roles.predictor.predict(request).mean == 20
    engine, request = learned({"by": "all"}, lengths, category="chat")
    assert engine.roles.predictor.predict(request).mean == 72


def test_history_answers_the_upper_quantile_of_recent_lengths_only():
    lengths = [("", 1000)] + [("", n) for n in range(1, 11)]
    engine = compose(predictor=("history", {"window": 10, "quantile": 0.5}))
    for i, (_, n) in enumerate(lengths):
        engine.add(ask(float(i), 1, n))
    engine.run()
    engine.add(ask(engine.clock.inner.now(), 1, 5))
    engine._ingest(engine.clock.inner.now())
    prediction = engine.roles.predictor.predict(next(iter(engine.waiting)))
    assert prediction.mean == 5.5 and prediction.upper == 6


def test_history_counts_only_lengths_above_what_is_generated_already():
    engine = compose(predictor="history", engine=EngineConfig(max_num_seqs=64))
    engine.run([ask(0.0, 1, n) for n in (5, 10, 50)])
    engine.add(ask(engine.clock.inner.now(), 1, 100))
    predicted = []
    for _ in range(60):
        engine.step()
        predicted.append(engine.roles.predictor.predict(next(iter(engine.running))).mean)
    made = range(1, 61)
    expected = [65 / 3] * 4 + [30.0] * 5 + [50.0] * 40 + [n + 1.0 for n in made if n >= 50]
    assert predicted == pytest.approx(expected)


def test_history_starts_from_a_guess_and_learns_nothing_from_refusals():
    engine, request = learned({"initial": 77.0}, [])
    assert engine.roles.predictor.predict(request).mean == 77
    engine = compose(predictor="history", admission=("early_reject", {"ttft": 0.0}))
    engine.run([ask(0.0, 1, 9)])
    assert engine.roster.finished[0].state == "rejected" and not engine.roles.predictor._sorted


@pytest.mark.parametrize(
    ("predictor", "message"),
    [
        (("history", {"by": "categry"}), "Did you mean category"),
        (("history", {"quantile": 0.0}), "quantile"),
        (("noisy", {"tau": 0.0}), "predictor.tau=0.0: expected a finite number > 0 and <= 1"),
        (("constant", {"length": 0.0}), "length"),
    ],
)
def test_predictors_refuse_parameters_that_predict_nothing(predictor, message):
    with pytest.raises(ConfigError, match=message):
        compose(predictor=predictor)


def test_better_rankings_give_shorter_mean_completions():
    """What vLLM-LTR measures: scheduling by predicted rank gets better with the ranker's Kendall tau."""
    assert issubclass(type(compose(order="sjf", predictor="oracle").roles["order"]), KeyOrder)
    mean = {}
    for tau in (0.1, 0.5, 1.0):
        total = 0.0
        for seed in range(6):
            rng = Random(seed)
            asked = [ask(0.0, 1, max(1, int(rng.lognormvariate(3, 1)))) for _ in range(60)]
            result = run(asked, order="sjf", predictor=("noisy", {"tau": tau}), seed=seed)
            total += sum(o.finish_time for o in result.outputs)
        mean[tau] = total
    assert mean[1.0] < mean[0.5] < mean[0.1]
