"""policy=vtc beside the logs of its authors: the overload and the weighted clients of VTC's artifact,
simulated."""

from __future__ import annotations

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
from experiments import vtc_suites
from experiments.vtc_suites import Until

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


# ---- the other suites of the artifact, and predicted lengths ---------------------------------------------


def test_eight_clients_that_ask_for_more_than_there_is_are_served_alike():
    """Theirs, over 360 s: at most 3,601 between any two."""
    suite = vtc_suites.SUITES["eight_clients"]
    clients, result = vtc_suites.served(suite, 150.0)
    assert len(clients) == 8 and result.num_preemptions == 0
    assert vtc_suites.since_the_beginning(clients, 150.0) <= 6_000


def test_a_client_that_comes_and_goes_and_one_of_other_lengths_stay_within_the_bound():
    """2 max(wp longest prompt, wq KV tokens) is 40,000."""
    for name in ("on_off", "short_long"):
        clients, result = vtc_suites.served(vtc_suites.SUITES[name], 150.0)
        assert 0 < service_difference(clients) < 40_000 and result.num_preemptions == 0


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
