"""The objects of a run by role, checked and named, as the core asks them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any

from .calls import Calls
from .clock import is_finite
from .compose.config import EngineConfig
from .context import Context, Truth
from .errors import ConfigError, near
from .execution import ExecutorCaps
from .executor import Executor
from .policy import (
    CALLBACKS,
    SERVICES,
    Admission,
    Admit,
    ChunkSize,
    Defer,
    Eviction,
    LengthPrediction,
    Order,
    Predictor,
    PrefixCache,
    Reject,
    Retention,
    Role,
    Scheduler,
    Victim,
)
from .renamed import with_names_of_today
from .request import Request, RequestState

if TYPE_CHECKING:
    from .view import View

_ADMIT = Admit()


def check_limits(config: EngineConfig, caps: ExecutorCaps, executor: str) -> None:
    """Raises ConfigError for limits that an executor of this name, which can do this, does not keep."""
    if config.max_inflight is not None and config.max_inflight > caps.max_inflight:
        at_most = f"executor {executor} takes at most {caps.max_inflight} plans in flight"
        raise ConfigError(f"engine.max_inflight={config.max_inflight}: {at_most}")
    if config.max_model_len is not None and config.max_model_len > caps.max_model_len:
        context = f"the model's context is {caps.max_model_len} tokens"
        raise ConfigError(f"engine.max_model_len={config.max_model_len}: {context}")


def num_blocks(config: EngineConfig, executor: Executor) -> int:
    """KV blocks of the pool. Raises ConfigError where there is no memory for any."""
    count = config.num_blocks or executor.kv_capacity(config.block_size)
    if count < 1:
        mend = "set engine.num_blocks, a smaller model or larger hardware"
        raise ConfigError(f"no memory is left for KV blocks of {config.block_size} tokens: {mend}")
    return count


def derived(
    left_open: list[tuple[str, Role, str]],
    config: EngineConfig,
    limits: dict[str, int],
) -> dict[str, int | float | str]:
    """What the roles, in their `setup`, and the engine made of parameters that were left open, by their
    names."""
    made = {f"{node}.{name}": getattr(role, name) for node, role, name in left_open}
    made |= {f"engine.{name}": value for name, value in limits.items() if getattr(config, name) is None}
    return {name: value for name, value in made.items() if isinstance(value, int | float | str)}


class CheckedPredictor(Predictor):
    """The predictor as policies meet it: its answers are checked, and it is known whether anybody asked."""

    def __init__(self, inner: Predictor, calls: Calls) -> None:
        self.inner, self._calls = inner, calls
        self.asked = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def predict(self, request: Request) -> LengthPrediction:
        self.asked = True
        answer = self._calls.call(self.inner, self.inner.predict, request)
        if isinstance(answer, LengthPrediction) and is_finite(answer.mean) and is_finite(answer.upper):
            return answer
        expected = "expected a LengthPrediction whose mean and upper are finite numbers of tokens"
        raise self._calls.refusal(self.inner, f"predict() answered {answer!r}: {expected}", request)


def _overrides(role: Role, callback: str) -> bool:
    return getattr(type(role), callback) is not getattr(Role, callback)


class GivenArrivals(Role):
    """Named in errors about arrivals that are handed to `Engine.run` where no workload makes them."""

    plugin_name = "the given arrivals"


@dataclass
class Roles:
    """One object per role; one object may fill several. `given` holds them by role, as they were given."""

    given: dict[str, Role]
    calls: Calls
    scheduler: Scheduler
    order: Order
    victim: Victim
    cache: PrefixCache
    eviction: Eviction
    executor: Executor
    chunk: ChunkSize | None = None
    admission: Admission | None = None
    predictor: CheckedPredictor | None = None
    retention: Retention | None = None
    workload: Any = None  # a Workload, or GivenArrivals

    @classmethod
    def of(cls, given: dict[str, Role], calls: Calls) -> Roles:
        """Names every role, and the callbacks that `calls` notifies. Raises ConfigError for missing ones."""
        given = with_names_of_today(given)
        for name in ("scheduler", "order", "victim", "cache", "eviction", "executor"):
            if name not in given:
                raise ConfigError(f"the engine needs a {name}: got roles {sorted(given)}")
        known = {field.name for field in fields(cls)} - {"given", "calls"}
        chosen: dict[str, Any] = {name: role for name, role in given.items() if name in known}
        chosen.setdefault("workload", GivenArrivals())
        objects = {id(role): (name, role) for name, role in reversed(given.items())}
        for name, role in objects.values():
            role.plugin_name = role.plugin_name or f"{name}={type(role).__name__}"
        if (predictor := chosen.get("predictor")) is not None:
            chosen["predictor"] = CheckedPredictor(predictor, calls)
            chosen["predictor"].plugin_name = predictor.plugin_name
        roles = cls(given, calls, **chosen)
        roles._check_services()
        calls.callbacks = roles._callbacks()
        return roles

    def __getitem__(self, name: str) -> Role:
        return self.given[name]

    @property
    def objects(self) -> list[Role]:
        """Every object once."""
        return list({id(role): role for role in reversed(self.given.values())}.values())

    def _check_services(self) -> None:
        offered = {"predictor": self.predictor is not None, "step_time": self.executor.cost_model is not None}
        for role in self.objects:
            for service in role.requires:
                if service not in SERVICES:
                    message = f"{role.plugin_name} requires {service!r}, which is no service."
                    raise ConfigError(message + near(service, SERVICES))
                if not offered.get(service, True):
                    missing = f"{role.plugin_name} needs {service}, and none is chosen"
                    raise ConfigError(f"{missing}: {SERVICES[service]}")

    # ---- numbers that a role chooses, checked -------------------------------------------------------------

    def most_preemptions(self, max_num_seqs: int) -> int:
        return self._chosen(self.victim, "most_preemptions", max_num_seqs)

    def plan_share(self, num_requests: int, num_plans: int) -> int:
        return self._chosen(self.scheduler, "plan_share", num_requests, num_plans)

    def tail_blocks(self, request: Request) -> int:
        return self._chosen(self.scheduler, "tail_blocks", request)

    def _chosen(self, role: Role, method: str, *given: Any) -> int:
        answer = self.calls.call(role, getattr(role, method), *given)
        if not isinstance(answer, int) or isinstance(answer, bool) or answer < 1:
            raise self.calls.refusal(
                role, f"{method}() answered {answer!r}: expected a whole number of at least 1"
            )
        return answer

    def _callbacks(self) -> dict[str, list[tuple[Role, Callable[..., None]]]]:
        """Of each callback, the roles that override it."""
        return {
            name: [(role, getattr(role, name)) for role in self.objects if _overrides(role, name)]
            for name in CALLBACKS
        }

    def set_up(self, config: EngineConfig, num_blocks: int, seed: int, truth: Truth) -> None:
        """Gives each object its generator and calls its `setup`; those that declare it get the truth."""
        caps = self.executor.caps
        handed = self.given | ({} if self.predictor is None else {"predictor": self.predictor})
        context = Context(
            seed=seed,
            block_size=config.block_size,
            num_blocks=num_blocks,
            max_model_len=config.max_model_len or caps.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            roles=handed,
            cost_model=self.executor.cost_model,
            model=caps.model,
            token_budget=min(caps.default_token_budget, config.max_num_batched_tokens),
            tokenizer=self.executor.tokenizer,
        )
        for role in self.objects:
            role.rng = Random(f"{seed}/{role.plugin_name}")
        for role in self.objects:
            own = replace(context, truth=truth if role.sees_truth else None)
            self.calls.call(role, role.setup, own)

    def left_open(self) -> list[tuple[str, Role, str]]:
        """(node, role, field) of each parameter of a role that is None."""
        found: list[tuple[str, Role, str]] = []
        for node, role in self.given.items():
            names: list[str] = [field.name for field in fields(role)] if is_dataclass(role) else []
            found += [(node, role, name) for name in names if getattr(role, name) is None]
        return found

    def admit(self, request: Request, view: View) -> Admit | Defer | Reject:
        """What admission answers for a request that wants to start, now."""
        preempted = request.state is not RequestState.WAITING
        if self.admission is None or (preempted and not self.admission.readmits):
            return _ADMIT
        answer = self.calls.call(self.admission, self.admission.admit, request, view)
        if isinstance(answer, (Admit, Defer)) or (isinstance(answer, Reject) and not preempted):
            return answer
        expected = (
            "Admit or Defer for a request that was preempted" if preempted else "Admit, Defer or Reject"
        )
        message = f"admit() answered {answer!r}: expected {expected}"
        raise self.calls.refusal(self.admission, message, request)

    def prompt_tokens(self, request: Request, left: int, view: View) -> int:
        """How many of at most `left` tokens the `chunk` role lets a prompt take in this step."""
        if self.chunk is None:
            return left
        tokens = self.calls.call(self.chunk, self.chunk.tokens, request, left, view)
        if isinstance(tokens, int) and 0 <= tokens <= left:
            return tokens
        raise self.calls.refusal(self.chunk, f"tokens() answered {tokens!r}: expected 0 to {left}", request)

    @property
    def know_the_future(self) -> bool:
        return any("future" in role.requires for role in self.objects)

    def saw_truth(self, num_evictions: int) -> list[str]:
        """Names of the roles that saw what no deployed policy can see, and influenced this run: a predictor
        if it was asked or a policy requires it, an eviction policy if it chose a block, every other role
        always."""
        silent: set[str] = set()
        required = any("predictor" in role.requires for role in self.objects)
        if self.predictor is not None and not self.predictor.asked and not required:
            silent.add("predictor")
        if not num_evictions:
            silent.add("eviction")
        return sorted(
            {role.plugin_name for n, role in self.given.items() if role.sees_truth and n not in silent}
        )
