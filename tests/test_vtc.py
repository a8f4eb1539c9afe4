"""policy=vtc beside the logs of its authors: the overload and the weighted clients of VTC's artifact,
simulated."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import hydra
import numpy as np
import pytest
from helpers.policy_runs import ask, compose, finishing, run
from hydra import initialize_config_dir

from core.cli import schema
from core.compose.build import build
from core.compose.config import EngineConfig
from core.compose.hooks import load_registry
from core.measure.fairness import ClientService, by_client, service_difference
from core.outputs import RunResult
from experiments import vtc_step_times, vtc_suites
from experiments.vtc_suites import Until
from plugins.executors import profile as profiles

CONF = Path(__file__).resolve().parent.parent / "conf"


def overload(seconds: float, *overrides: str) -> tuple[list[ClientService], RunResult]:
    """What the clients of experiment=vtc_fairness were served in the first so many seconds, and all of the
    run."""
    registry = load_registry()
    schema.register(registry)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        given = ["experiment=vtc_fairness", "tracking=none", f"workload.duration={seconds}", *overrides]
        composition = schema.composition(hydra.compose("config", given))
    result = build(registry, composition, observers=[Until(seconds)]).execute()
    return [service for _, service in sorted(by_client(result.outputs).items())], result


def test_the_overload_is_as_fair_as_in_the_authors_logs_and_nobody_is_preempted():
    """Theirs, on an A10G: at most 7,947 between the two clients, 240,572 and 241,920 served at 360 s."""
    (one, other), result = overload(360.0)
    assert result.num_preemptions == 0
    at = np.arange(0.0, 360.0, 1.0)
    assert np.abs(one.service(at) - other.service(at)).max() <= 10_000
    for ours, theirs in zip((one, other), (240_572, 241_920), strict=True):
        assert ours.service(360.0) == pytest.approx(theirs, rel=0.2)


def test_weighted_clients_are_served_in_proportion_to_their_weights():
    """Four clients, each with more to ask than it can get. Theirs is 1 : 2.00 : 3.00 : 4.01."""
    weights = ",".join(f"client{i}:{i + 1}" for i in range(4))
    clients, result = overload(240.0, "workload.rates=[2,2,2,2]", f"order.weights={{{weights}}}")
    assert result.num_preemptions == 0
    served = [client.service(240.0) - client.service(20.0) for client in clients]
    assert [s / served[0] for s in served] == pytest.approx([1, 2, 3, 4], rel=0.03)


# ---- the suites of the artifact, request by request ------------------------------------------------------


@cache
def simulated(name: str) -> RunResult:
    return vtc_suites.run(vtc_suites.SUITES[name])


@pytest.mark.parametrize(
    ("name", "counts", "first", "last"),
    [
        ("overload", [540, 1080], 0.650238102, 360.316904769),
        ("on_off", [600, 1800], 0.650238102, 600.316904769),
        ("eight_clients", [144] * 3 + [216] * 5, 1.763472687, 362.376785766),
        ("short_long", [4826, 874], 0.036768239, 584.316638343),
        ("short_long_2", [4826, 874], 0.036768239, 584.316638343),
        ("weighted", [144, 288, 432, 576], 0.999161553, 361.188392883),
    ],
)
def test_the_requests_are_those_of_the_authors_logs(
    name: str, counts: list[int], first: float, last: float
) -> None:
    """How many each client sends, and when the first and the last one comes."""
    asked = vtc_suites.SUITES[name].asked
    assert [sum(ask.client == client for ask in asked) for client in range(len(counts))] == counts
    assert (asked[0].time, asked[-1].time) == pytest.approx((first, last), abs=1e-9)


@pytest.mark.parametrize("name", ["overload", "on_off", "eight_clients", "short_long"])
def test_clients_differ_by_as_much_as_in_the_authors_logs_and_are_served_as_much(name: str) -> None:
    """Differences depend on who ends when, to a fifth or so; what is served is the speed's."""
    suite, result = vtc_suites.SUITES[name], simulated(name)
    service = vtc_suites.served(result.outputs, suite.seconds)
    assert result.num_preemptions == 0
    assert vtc_suites.difference(service) == pytest.approx(suite.difference, rel=0.25)
    assert service[:, -1] == pytest.approx(suite.served, rel=0.06)
    assert service[:, -1].sum() == pytest.approx(sum(suite.served), rel=0.02)


def test_the_measure_spreads_a_request_s_service_from_its_first_token_to_its_last() -> None:
    """512 tokens of prompt and 256 of answer between second 5 and 25: half of 1,024 by second 15."""
    asked = [ask(0.0, 512, 256, "a", client="a"), ask(0.0, 1, 1, "b", client="b")]
    outputs = compose(engine=EngineConfig(max_num_seqs=2)).run(asked).outputs
    outputs = [
        replace(o, token_times=[5.0 + 20.0 * j / 255 for j in range(256)] if o.id == "a" else o.token_times)
        for o in outputs
    ]
    assert vtc_suites.served(outputs[:1], 30.0).tolist() == [pytest.approx([0.0, 256.0, 768.0, 1024.0])]


def test_step_times_are_found_in_when_tokens_came() -> None:
    """From what the simulator made of a profile, the profile comes back."""
    runs = []
    for name in ("overload", "short_long"):
        begun = [o for o in simulated(name).outputs if len(o.token_times) > 1]
        columns = sorted(
            (o.token_times[0], o.token_times[-1], o.num_prompt_tokens, len(o.token_times)) for o in begun
        )
        runs.append(vtc_step_times.Answers(*np.array(columns).T))
    terms, error = vtc_step_times.fitted(runs)
    shipped = profiles.read(Path(vtc_suites.THEIRS["executor.profile"]))
    assert error["p90"] < 0.02
    for running, context in ((20, 384), (50, 128)):
        steps = [context] * running, [1] * running
        assert terms["decode"].seconds(*steps) == pytest.approx(shipped.decode.seconds(*steps), rel=0.03)
    prompts = [0, 0], [256, 64]
    assert terms["mixed"].seconds(*prompts) == pytest.approx(shipped.mixed.seconds(*prompts), rel=0.05)


# ---- predicted lengths -----------------------------------------------------------------------------------


def test_with_true_lengths_clients_drift_apart_less_than_by_what_has_come():
    """The section of the paper on length prediction; 256 tokens of answer are charged at once instead of one
    by one."""
    apart = {}
    for order in ("vtc", "vtc_predicted"):
        clients, _ = overload(150.0, f"order={order}", "predictor=oracle")
        apart[order] = service_difference(clients)
    assert apart["vtc_predicted"] < 0.5 * apart["vtc"]


def test_what_was_charged_for_tokens_that_did_not_come_is_given_back():
    """A predictor that always says 50 is wrong both ways; at the end both counters are what was served."""
    asked = [ask(0.0, 4, 10, "short", client="a"), ask(0.0, 4, 80, "long", client="b")]
    engine = compose(
        order="vtc_predicted", predictor=("constant", {"length": 50.0}), engine=EngineConfig(max_num_seqs=2)
    )
    for arrival in asked:
        engine.add(arrival)
    engine.step()
    assert engine.roles.given["order"].counters == {"a": 4 + 2 * 50, "b": 4 + 2 * 50}
    while engine.step():
        pass
    assert engine.roles.given["order"].counters == {"a": 4 + 2 * 10, "b": 4 + 2 * 80}


def test_a_client_whose_counter_shrinks_is_served_before_others_at_once():
    """ "z" was charged for 50 tokens and got two: when its place is free, its next request is first, ahead of
    "b"'s."""
    asked = [ask(0.0, 4, 2, "z0", client="z"), ask(0.001, 4, 20, "b0", client="b")]
    asked += [ask(0.002, 4, 1, "z1", client="z"), ask(0.003, 4, 1, "b1", client="b")]
    choices = {"order": "vtc_predicted", "predictor": ("constant", {"length": 50.0})}
    assert finishing(run(asked, **choices, engine=EngineConfig(max_num_seqs=1))) == ["z0", "z1", "b0", "b1"]
