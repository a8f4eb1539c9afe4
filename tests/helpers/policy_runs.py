"""What the tests of policies share: runs composed by name on a server whose step times are a straight
line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from core.compose.build import build_roles
from core.compose.config import EngineConfig
from core.compose.defaults import default_choices
from core.compose.hooks import load_registry
from core.engine import Engine
from core.executor import Executor
from core.inputs import SLO, Arrival, SamplingParams, Tags
from core.outputs import RunResult
from core.outside import Observer, StepRecord
from core.testing.virtual import VirtualExecutor

REGISTRY = load_registry()
Server = VirtualExecutor
NO_SLO = SLO()


@dataclass
class Steps(Observer):
    """Keeps every step's record."""

    records: list[StepRecord] = field(default_factory=list)

    def on_step(self, record: StepRecord) -> None:
        self.records.append(record)


def ask(
    time: float,
    prompt: int | list[int],
    output: int,
    id: str | None = None,
    slo: SLO = NO_SLO,
    salt: str = "",
    **tags: Any,
) -> Arrival:
    """A request of so many prompt tokens (or these) that generates `output` tokens."""
    tokens = list(range(2, 2 + prompt)) if isinstance(prompt, int) else prompt
    return Arrival(time, tokens, SamplingParams(max_tokens=None), output, id, Tags(**tags), slo, salt)


def compose(
    *,
    server: Executor | None = None,
    seed: int = 0,
    observers: Any = (),
    engine: EngineConfig | None = None,
    **choices: Any,
) -> Engine:
    """An engine of plugins by name: order="vtc", or order=("vtc", {"wq": 4.0})."""
    roles, _ = build_roles(REGISTRY, default_choices(**({"cache": "none"} | choices)))
    roles["executor"] = server or Server()
    return Engine(roles, engine or EngineConfig(max_num_seqs=1), seed=seed, observers=observers)


def run(arrivals: list[Arrival], **choices: Any) -> RunResult:
    return compose(**choices).run(arrivals)


def finishing(result: RunResult) -> list[str]:
    """Ids in the order of finishing."""
    return [o.id for o in sorted(result.outputs, key=lambda o: (o.finish_time, o.index))]


def mean_completion(result: RunResult) -> float:
    return sum(o.finish_time - o.arrival_time for o in result.outputs) / len(result.outputs)


def service(steps: Steps, wp: float = 1.0, wq: float = 2.0) -> list[tuple[float, dict[str, float]]]:
    """After every step: its end, and what each client has been served so far: prompts at admission, tokens as
    they come."""
    total: dict[str, float] = {}
    series = []
    for record in steps.records:
        for request in record.plan.admitted:
            if request.arrival_time <= record.end and record.plan.now == request.first_scheduled_time:
                total[request.tags.client] = (
                    total.get(request.tags.client, 0.0) + wp * request.num_prompt_tokens
                )
        for request, new in zip(record.plan.requests, record.tokens, strict=True):
            for _ in new:
                total[request.tags.client] = total.get(request.tags.client, 0.0) + wq
        series.append((record.end, dict(total)))
    return series
