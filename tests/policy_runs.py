"""What the tests of policies share: a virtual server whose step times are a straight line, and runs composed by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from core.build import build_roles
from core.config import EngineConfig
from core.engine import Engine
from core.execution import ExecutorCaps, StepResult
from core.executor import Executor
from core.hooks import load_registry
from core.policy import Observer, StepRecord
from core.request import SLO, Arrival, RunResult, SamplingParams, Tags
from headway import Tokens, VirtualClock

REGISTRY = load_registry()
NO_SLO = SLO()


@dataclass
class Server(Executor):
    """A step takes `overhead` + `per_token` * its tokens seconds; every sampled token is 1, so output_len alone ends a request."""

    overhead: float = 0.01
    per_token: float = 0.0
    max_model_len: int = 1 << 16

    def __post_init__(self) -> None:
        self.caps = ExecutorCaps(self.max_model_len, 1 << 20, max_inflight=2)
        self.clock = VirtualClock()
        self.cost_model = self
        self._free = 0.0

    def step_time(self, starts: Any, lengths: Any) -> float:
        return self.overhead + self.per_token * sum(lengths)

    def kv_capacity(self, block_size: int) -> int:
        return 1 << 20

    def launch(self, plan: Any) -> Any:
        start = max(self.clock.now(), self._free)
        self._free = start + self.step_time(plan.starts, plan.lengths)
        return plan, start, self._free

    def collect(self, ticket: Any) -> StepResult:
        plan, start, end = ticket
        return StepResult(Tokens([1 if sample else -1 for sample in plan.samples]), start, end)


@dataclass
class Steps(Observer):
    """Keeps every step's record."""

    records: list[StepRecord] = field(default_factory=list)

    def on_step(self, record: StepRecord) -> None:
        self.records.append(record)


def ask(time: float, prompt: int | list[int], output: int, id: str | None = None, slo: SLO = NO_SLO, salt: str = "", **tags: Any) -> Arrival:
    """A request of so many prompt tokens (or these) that generates `output` tokens."""
    tokens = list(range(2, 2 + prompt)) if isinstance(prompt, int) else prompt
    return Arrival(time, tokens, SamplingParams(max_tokens=None), output, id, Tags(**tags), slo, salt)


def compose(*, server: Executor | None = None, seed: int = 0, observers: Any = (), engine: EngineConfig | None = None, **choices: Any) -> Engine:
    """An engine of plugins by name: order="vtc", or order=("vtc", {"wq": 4.0})."""
    named = {"scheduler": "chunked", "order": "fcfs", "victim": "newest", "cache": "none", "eviction": "lru"} | choices
    pairs = {role: (choice, {}) if isinstance(choice, str) else choice for role, choice in named.items()}
    roles, _ = build_roles(REGISTRY, pairs)
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
    """After every step: its end, and what each client has been served so far: prompts at admission, tokens as they come."""
    total: dict[str, float] = {}
    series = []
    for record in steps.records:
        for request in record.plan.admitted:
            if request.arrival_time <= record.end and record.plan.now == request.first_scheduled_time:
                total[request.tags.client] = total.get(request.tags.client, 0.0) + wp * request.num_prompt_tokens
        for request, new in zip(record.plan.requests, record.tokens, strict=True):
            for _ in new:
                total[request.tags.client] = total.get(request.tags.client, 0.0) + wq
        series.append((record.end, dict(total)))
    return series
