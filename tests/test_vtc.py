"""policy=vtc beside the logs of its authors: the overload and the weighted clients of VTC's artifact, simulated."""

from __future__ import annotations

from pathlib import Path

import hydra
import numpy as np
import pytest
from hydra import initialize_config_dir

from core.cli import schema
from core.compose.build import build
from core.compose.hooks import load_registry
from core.measure.fairness import ClientService, by_client
from core.outputs import RunResult
from core.policy import Observer, StepRecord

CONF = Path(__file__).resolve().parent.parent / "conf"


class Until(Observer):
    """Ends the run when so many seconds are over, as Ctrl-C would."""

    plugin_name = "until"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_step(self, record: StepRecord) -> None:
        if record.end >= self.seconds:
            raise KeyboardInterrupt


def overload(seconds: float, *overrides: str) -> tuple[list[ClientService], RunResult]:
    """What the clients of experiment=vtc_fairness were served in the first so many seconds, and all of the run."""
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
