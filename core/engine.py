"""The loop: arrivals -> plan -> launch ..(max_inflight - 1 steps later).. collect -> publish -> release -> callbacks.

`max_inflight` is the whole of overlap and pipelining: 1 is synchronous and the reference, 2 hides the host behind the
device, `pp` keeps a pipeline full. The engine is the only writer of requests; the pool, of reference counts.

An engine serves any number of runs, one after the other. Counts, ids and outputs are those of one run. What policies have learned and
what is cached goes on from a run that finished; after one that was cut off, the next begins with new state in everything but the executor.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from random import Random
from typing import Any

from . import spans
from .arrivals import Coming, checked, in_order
from .blocks import ROOT, BlockPool
from .clock import RecordingClock, is_finite
from .config import EngineConfig
from .decisions import DecisionLog
from .errors import ConfigError, NothingPlanned, near
from .guard import CheckedPredictor, Guard
from .interrupts import interrupts
from .ledger import Ledger
from .pins import Pins
from .plan import StepPlan
from .policy import (
    CALLBACKS,
    SERVICES,
    Admit,
    Context,
    Defer,
    Executor,
    ExecutorCaps,
    Observer,
    Oracle,
    Reject,
    Role,
    StepRecord,
    StepResult,
)
from .prompts import readable
from .request import Arrival, Request, RequestList, RequestOutput, RequestState, RunResult
from .step import StepBuilder
from .view import View

_RUNNING = RequestState.RUNNING
MOST_TURNS_AT_ONCE = 50  # that may begin and end at one time with nothing done, because a policy asks to be woken at once
MOST_IDLE_TURNS = 1_000_000  # with nothing done, woken by policies at later times
FIRST_NAP = 1e-9  # seconds until the next turn for who wants one at once, doubled each time, so that virtual time moves


class _Given(Role):
    """Who is named for arrivals that are handed to `run` where no role makes them."""

    plugin_name = "the given arrivals"


def check_limits(config: EngineConfig, caps: ExecutorCaps, executor: str) -> None:
    """Raises ConfigError for limits that an executor of this name, which can do this, does not keep."""
    if config.max_inflight is not None and config.max_inflight > caps.max_inflight:
        raise ConfigError(f"engine.max_inflight={config.max_inflight}: executor {executor} takes at most {caps.max_inflight} plans in flight")
    if config.max_model_len is not None and config.max_model_len > caps.max_model_len:
        raise ConfigError(f"engine.max_model_len={config.max_model_len}: the model's context is {caps.max_model_len} tokens")


class Engine:
    """Composes one object a role into a running system. `roles` maps a config node to its object; see `policy.ROLES`."""

    # Counts of the run in progress, or of the last one.
    num_steps: int
    num_preemptions: int
    planned_tokens: int
    kv_peak: int
    policy_time: float  # CPU seconds of planning and book-keeping, in this thread
    busy_time: float
    _prepared: int  # kernels and graphs that the executor had made late before the run

    def __init__(
        self,
        roles: dict[str, Role],
        config: EngineConfig | None = None,
        *,
        seed: int = 0,
        observers: Sequence[Observer] = (),
        stop_text: Callable[[Request], bool] | None = None,
    ) -> None:
        self.config = config = config or EngineConfig()
        self.roles, self.seed, self.observers = roles, seed, list(observers)
        for name in ("scheduler", "order", "victim", "cache", "eviction", "executor"):
            if name not in roles:
                raise ConfigError(f"the engine needs a {name}: got roles {sorted(roles)}")
        self.scheduler: Any = roles["scheduler"]
        self.victim: Any = roles["victim"]
        self.budget: Any = roles.get("budget")
        self.admission: Any = roles.get("admission")
        self.predictor: Any = None  # made below: what policies ask instead of the role itself
        self.retention: Any = roles.get("retention")
        self.cache: Any = roles["cache"]
        self.executor: Executor = roles["executor"]  # type: ignore[assignment]
        self._workload: Role = roles.get("workload") or _Given()
        self.stop_text = stop_text  # decides stop strings; needs a tokenizer, so it comes from outside

        caps = self.executor.caps
        check_limits(config, caps, self.executor.plugin_name)
        self.max_model_len = config.max_model_len or caps.max_model_len
        self.max_num_seqs, self.max_num_batched_tokens = config.max_num_seqs, config.max_num_batched_tokens
        self.max_inflight = caps.default_inflight if config.max_inflight is None else config.max_inflight
        self.placeholders = caps.placeholders
        self.eos_token_ids = caps.eos_token_ids
        self.cost_model = self.executor.cost_model
        num_blocks = config.num_blocks or self.executor.kv_capacity(config.block_size)
        if num_blocks < 1:
            raise ConfigError(
                f"no memory is left for KV blocks of {config.block_size} tokens: set engine.num_blocks, a smaller model or larger hardware"
            )
        self.pool = BlockPool(num_blocks, config.block_size, self.cache, roles["eviction"])  # type: ignore[arg-type]

        self.clock = RecordingClock(self.executor.clock)
        self.waiting, self.running = RequestList(), RequestList()
        self.view = View(self)
        self.guard = Guard(self.view)
        if (predictor := roles.get("predictor")) is not None:
            self.predictor = CheckedPredictor(predictor, self.guard)
        self.builder = StepBuilder(self)
        self.decisions = DecisionLog()
        self.oracle = Oracle()
        self.finished: list[RequestOutput] = []  # in order of finishing, of the run in progress or the last one
        self.preemptions_since_token = 0
        self._count_anew()
        self._last_end = 0.0
        self._num_runs = 0
        self._began = 0.0  # of the run in progress, on the clock
        self._inflight: deque[tuple[StepPlan, Any, float, int]] = deque()
        self.coming = Coming()
        self._next_index = 0
        self._ids: set[str] = set()
        self._brought: set[str] = set()  # ids of requests that are known to come
        self._idle_turns = 0  # since something was done
        self._turns_at_once = 0  # of those, that a policy asked for without a time to wait for
        self._left: list[Request] = []
        self._rejected: list[Request] = []  # by a policy since the last plan; the decision log takes them
        self._done: list[Request] = []  # ended since observers last heard
        self._keep: dict[int, int] = {}  # request index -> head blocks kept by a drop_tail preemption
        self.owed: dict[int, int] = {}  # running request index -> blocks it was promised from those in flight
        self._releasing: dict[int, Request] = {}  # preempted or ended, with blocks still in flight
        self._pins = Pins(self.pool)
        self._ledger = Ledger(self) if config.check else None
        self.on_result: Callable[[Request, float], Iterable[Arrival]] | None = None

        self._name_roles()
        left_open = self._left_open()
        self._setup_roles()
        self.derived = self._derived(left_open)  # the same in every run
        self.executor.start(num_blocks, config.block_size, config.max_num_seqs, config.max_num_batched_tokens, seed)
        self._prepared = self.executor.preparation.late

    def _name_roles(self) -> None:
        objects = {id(role): (name, role) for name, role in reversed(self.roles.items())}  # one object may fill several roles
        self._objects = [role for _, role in objects.values()]
        for name, role in objects.values():
            role.plugin_name = role.plugin_name or f"{name}={type(role).__name__}"
            for service in role.requires:
                if service not in SERVICES:
                    raise ConfigError(f"{role.plugin_name} requires {service!r}, which is no service.{near(service, SERVICES)}")
                if (service == "predictor" and self.predictor is None) or (service == "step_time" and self.cost_model is None):
                    raise ConfigError(f"{role.plugin_name} needs {service}, and none is chosen: {SERVICES[service]}")
        self.callbacks: dict[str, list[tuple[Role, Callable[..., None]]]] = {
            name: [(role, getattr(role, name)) for role in self._objects if getattr(type(role), name) is not getattr(Role, name)]
            for name in CALLBACKS
        }
        if self.predictor is not None:
            self.predictor.plugin_name = self.predictor.inner.plugin_name

    def _setup_roles(self) -> None:
        config, caps = self.config, self.executor.caps
        handed = dict(self.roles) | ({} if self.predictor is None else {"predictor": self.predictor})
        for role in self._objects:
            role.rng = Random(f"{self.seed}/{role.plugin_name}")
        for role in self._objects:
            context = Context(
                self.seed, config.block_size, self.pool.num_blocks, self.max_model_len, config.max_num_seqs, config.max_num_batched_tokens,
                handed, self.cost_model, caps.model, self.oracle if role.oracle else None,
                token_budget=min(caps.default_token_budget, config.max_num_batched_tokens),
            )  # fmt: skip
            self.guard.call(role, role.setup, context)

    def _left_open(self) -> list[tuple[str, Role, str]]:
        """(node, role, field) of each parameter of a role that is None."""
        found: list[tuple[str, Role, str]] = []
        for node, role in self.roles.items():
            names: list[str] = [f.name for f in fields(role)] if is_dataclass(role) else []
            found += [(node, role, name) for name in names if getattr(role, name) is None]
        return found

    def _derived(self, left_open: list[tuple[str, Role, str]]) -> dict[str, Any]:
        """What the roles, in their `setup`, and the engine made of parameters that were left open, by their names."""
        made = {f"{node}.{name}": getattr(role, name) for node, role, name in left_open}
        limits = {"num_blocks": self.pool.num_blocks, "max_inflight": self.max_inflight, "max_model_len": self.max_model_len}
        made |= {f"engine.{name}": value for name, value in limits.items() if getattr(self.config, name) is None}
        return {name: value for name, value in made.items() if isinstance(value, int | float | str)}

    @property
    def oracles(self) -> list[str]:
        """Names of the roles that saw what no deployed policy can see, and had a say in this run: a predictor has one when it was asked
        or a policy requires it, an eviction policy when it chose a block. Every other role has one always."""
        silent: set[str] = set()
        if self.predictor is not None and not self.predictor.asked and not any("predictor" in role.requires for role in self._objects):
            silent.add("predictor")
        if not self.pool.num_evictions:
            silent.add("eviction")
        return sorted({role.plugin_name for name, role in self.roles.items() if role.oracle and name not in silent})

    # ---- plugins are called here ---------------------------------------------------------------------------------

    def _notify(self, event: str, *args: Any) -> None:
        for role, function in self.callbacks[event]:
            self.guard.call(role, function, *args)

    # ---- arrivals ------------------------------------------------------------------------------------------------

    def add(self, arrival: Arrival) -> None:
        """One more request, at its own time on the clock (or now, if that has passed)."""
        self.coming.add(checked(arrival, "Engine.add: the arrival"))

    def _ingest(self, now: float) -> None:
        for arrival in self.coming.until(now):
            self._arrive(arrival, now)

    def _arrive(self, arrival: Arrival, now: float) -> None:
        arrival, wrong = readable(arrival)
        request = Request(arrival, self._next_index, max_model_len=self.max_model_len, eos_token_ids=self.eos_token_ids)
        if arrival.id is None:
            request.id = self._automatic_id()
        self._next_index += 1
        self._idle_turns = self._turns_at_once = 0
        problem = wrong or self._problem(request, arrival)
        self._ids.add(request.id)
        if problem:
            self._end(request, RequestState.REJECTED, problem, now)
            self._follow(request, now)
            return
        self.waiting.add(request)
        if self._ledger is not None:
            self._ledger.arrived(request)
        self._notify("on_arrival", request, now)
        if self.admission is not None:
            self.view._refresh(self.num_steps, now, len(self._inflight))
            answer = self.guard.call(self.admission, self.admission.admit, request, self.view)
            if isinstance(answer, Reject):
                self._reject(request, answer.reason)
            elif not isinstance(answer, (Admit, Defer)):
                raise self.guard.refusal(self.admission, f"admit() answered {answer!r}: expected Admit, Defer or Reject", request)

    def _automatic_id(self) -> str:
        """For a request that brings none: r and its index, or the next number that no other request has or is known to bring."""
        number = self._next_index
        while (id := f"r{number}") in self._ids or id in self._brought:
            number += 1
        return id

    def _problem(self, request: Request, arrival: Arrival) -> str:
        """Why a request can never run; "" if it can."""
        size, prompt = self.pool.block_size, request.num_prompt_tokens
        if request.id in self._ids:
            return f"id {request.id!r} is taken: ids must be unique in a run"
        if prompt == 0:
            return "empty prompt: expected at least one token"
        if prompt >= self.max_model_len:
            return f"prompt of {prompt} tokens does not fit the context of {self.max_model_len}: one token must be left for the answer"
        if arrival.output_len is not None and arrival.output_len < 1:
            return f"output length {arrival.output_len}: expected at least 1"
        if request.sampling.stop and self.stop_text is None:
            return f"stop strings need a tokenizer, and {self.executor.plugin_name} has none for this model: use stop_token_ids"
        vocab, low, high = self.executor.caps.vocab_size, min(request.token_ids), max(request.token_ids)
        if low < 0 or high >= vocab:
            return f"token id {low if low < 0 else high} is outside the vocabulary of {vocab}"
        if (wanted := request.sampling.logprobs) is not None and wanted > vocab:
            return f"logprobs={wanted}: the vocabulary has {vocab} tokens"
        need = -(-(min(request._limit, request._stop_at) - 1) // size)  # the last token is sampled, never computed
        if need > self.pool.num_blocks:
            return f"needs up to {need} KV blocks, the pool has {self.pool.num_blocks}: lower max_tokens or raise engine.num_blocks"
        return ""

    # ---- what StepBuilder asks of the engine ----------------------------------------------------------------------

    def _admit(self, request: Request, matched: Sequence[int], cached: int) -> None:
        self.view._freeze()
        first = request.state is RequestState.WAITING
        if not request.block_table:
            self.pool.acquire(matched, request.tags)
            request.block_table = list(matched)
            request._published = len(matched)
            request._parent = matched[-1] if matched else ROOT
            request.num_computed_tokens = cached
        request._since = cached
        if first:
            request.num_cached_tokens = cached
            request.first_scheduled_time = self.view.now
        self.waiting.remove(request)
        self.running.add(request)
        request.state = _RUNNING
        self._notify("on_admit", request, self.view.now)

    def _preempt(self, request: Request, keep: int) -> None:
        self.view._freeze()
        request.state = RequestState.PREEMPTED
        self.owed.pop(request.index, None)
        request.num_preemptions += 1
        request._past = spans.union(request._past, request._since, request.num_computed_tokens + request.num_scheduled_tokens)
        self.num_preemptions += 1
        self.preemptions_since_token += 1
        self.running.remove(request)
        self.waiting.add(request)
        self._left.append(request)
        if keep:
            self._keep[request.index] = keep
        self._notify("on_preempt", request, self.view.now)
        self._give_back(request)

    def _reject(self, request: Request, reason: str) -> None:
        self._rejected.append(request)
        self.view._freeze()
        self.waiting.remove(request)
        self._end(request, RequestState.REJECTED, reason, self.view.now)
        self._notify("on_finish", request, self.view.now)
        self._follow(request, self.view.now)

    @property
    def thrashing(self) -> bool:
        """Requests evict each other before any of them emits a token: a livelock unless somebody is protected."""
        return self.preemptions_since_token > 2 * self.max_num_seqs + 8

    def num_releasing_blocks(self) -> int:
        """Blocks that come free when the steps in flight have come back."""
        blocks = self.pool.blocks
        return sum(1 for r in self._releasing.values() for b in r.block_table[self._keep.get(r.index, 0) :] if blocks[b].ref_count == 1)

    def _reclaim(self, needy: Request) -> bool:
        """The last resorts before a request preempts itself: heads kept by waiting requests, then the pin that ends soonest."""
        for request in reversed(self.waiting.items):
            if request.block_table and request is not needy and not request._in_flight:
                self._release(request)
                return True
        return self._pins.give_up_soonest()

    def _give_back(self, request: Request) -> None:
        """Releases blocks now, or when the last step in flight that uses them has come back."""
        if request._in_flight:
            self._releasing[request.index] = request
        else:
            self._release(request, self._keep.pop(request.index, 0))

    def _release(self, request: Request, keep: int = 0) -> None:
        """Gives the blocks after the first `keep` back."""
        table, size = request.block_table, self.pool.block_size
        keep = min(keep, request.num_computed_tokens // size)
        twins = [request._shadow.pop(i) for i in sorted(request._shadow) if i >= keep]
        self.pool.release(twins, request.tags)
        self.pool.release(table[keep:], request.tags)
        request.block_table = table[:keep]
        request.num_computed_tokens = keep * size
        if request._published > keep:
            request._published = keep
            request._parent = request._shadow.get(keep - 1, table[keep - 1]) if keep else ROOT
        request._match = None
        if request.index in self._pins.dropped:  # its retention policy said so
            self._pins.dropped.remove(request.index)
            if self.cache.enabled:
                self.pool.drop(self._cached_content(request))

    # ---- one turn of the loop --------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Ingests, plans and launches if there is room in flight, else collects. False when there is nothing left to do."""
        if self.coming and 0 < len(self._inflight) == self.max_inflight - 1:
            self.guard.call(self.executor, self.executor.linger)
        now = self.clock.now()
        self.pool.now = now
        self._ingest(now)
        self._pins.expire(now)
        planned = False
        if len(self._inflight) < self.max_inflight and (self.running.items or self.waiting.items):
            planned = True
            if self._plan(now):
                self._idle_turns = self._turns_at_once = 0
                if len(self._inflight) >= self.max_inflight:
                    self._collect()
                return True
        if self._inflight:
            self._collect()
            return True
        return self._idle(now, self.builder._wake if planned else None)

    def _plan(self, now: float) -> bool:
        """One plan and its launch. False if nothing was decided."""
        began = time.thread_time()
        builder, step = self.builder, self.num_steps
        self.view._refresh(step, now, len(self._inflight))
        seqs = self.max_num_seqs
        if not self.placeholders and self.max_inflight > 1:
            # A request in flight can't be planned again, so each plan takes its share and leaves the rest to the next.
            seqs = max(1, -(-(len(self.running) + len(self.waiting)) // self.max_inflight))
        builder._reset(step, now, self.max_num_batched_tokens, min(seqs, self.max_num_seqs))
        self.guard.call(self.scheduler, self.scheduler.plan, builder, self.view)
        if self._ledger is not None:
            self._ledger.planned(builder)
        evicted, self.pool.evicted = self.pool.evicted, []
        rejected, self._rejected = self._rejected, []
        launching = bool(builder._requests)
        left: list[Request] = []
        if launching:
            left, self._left = self._left, left
        plan = builder._build(left)
        decided = launching or bool(builder._preempted or rejected)
        if decided:  # with nothing to run the state moved all the same: plan again. The executor hears of it with the next plan.
            self.decisions.record(plan, evicted, rejected)
            self.num_steps += 1
        spent = time.thread_time() - began
        self.policy_time += spent
        if launching:
            self.planned_tokens += plan.num_tokens
            self.kv_peak = max(self.kv_peak, self.pool.num_used)
            self._launch(plan, spent, len(evicted))
        return decided

    def _launch(self, plan: StepPlan, spent: float, num_evicted: int) -> None:
        try:
            ticket = self.guard.call(self.executor, self.executor.launch, plan)
        except BaseException:
            self._left = plan.left + self._left  # the executor may not have heard of them
            raise
        self._inflight.append((plan, ticket, spent, num_evicted))

    def _collect(self) -> None:
        plan, ticket, spent, num_evicted = self._inflight[0]
        try:
            result = self.guard.call(self.executor, self.executor.collect, ticket)
        except Exception:
            self._inflight.clear()  # an executor that has failed is not asked for the steps behind
            raise
        self._inflight.popleft()
        self._check_result(plan, result)
        self.clock.advance_to(result.end)
        now = self.clock.now()
        began = time.thread_time()
        self.pool.now = now
        tokens, emitted = self._update(plan, result.tokens, now, result.logprobs)
        updating = time.thread_time() - began
        self.policy_time += updating
        self.busy_time += max(0.0, result.end - max(result.start, self._last_end))  # steps of a pipeline overlap
        self._last_end = max(self._last_end, result.end)
        pool = self.pool
        record = StepRecord(
            plan.step, plan, result.start, now, tokens, emitted, spent + updating, len(self.running), len(self.waiting), pool.num_used,
            pool.num_cached, len(plan.preempted), num_evicted, result.timings,
        )  # fmt: skip
        self._notify("on_step_end", record)
        if self._ledger is not None:
            self._ledger.collected(plan, tokens)
            pool.check()
        self._observe("on_step", record)
        if self._done:
            done, self._done = self._done, []
            self._observe("on_requests", done)

    def _observe(self, event: str, *args: Any) -> None:
        for observer in self.observers:
            self.guard.call(observer, getattr(observer, event), *args)

    def _check_result(self, plan: StepPlan, result: StepResult) -> None:
        """One token for each chunk that samples, -1 for the others, and times that a clock can show."""
        executor, samples = self.executor, plan.samples
        if not isinstance(result, StepResult):
            raise self.guard.refusal(executor, f"collect() answered {result!r}: expected a StepResult")
        tokens = result.tokens
        if len(tokens) != len(samples):
            raise self.guard.refusal(executor, f"collect() answered {len(tokens)} tokens for {len(samples)} requests in step {plan.step}")
        if not (is_finite(result.start) and is_finite(result.end)):
            message = f"collect() answered start={result.start} and end={result.end} for step {plan.step}: expected finite seconds"
            raise self.guard.refusal(executor, message)
        try:
            right = min(tokens) >= 0 if False not in samples else [token >= 0 for token in tokens] == samples
        except (TypeError, ValueError):
            right = False
        if not right:
            wrong = next(i for i, sample in enumerate(samples) if not isinstance(tokens[i], int) or (tokens[i] >= 0) != sample)
            expected = "a token id" if samples[wrong] else "-1, since its chunk samples nothing"
            message = f"collect() answered {tokens[wrong]!r} in step {plan.step}: expected {expected}"
            raise self.guard.refusal(executor, message, plan.requests[wrong])

    def _update(self, plan: StepPlan, tokens: Sequence[int], now: float, logprobs: Sequence[Any] | None) -> tuple[Sequence[int], int]:
        """Applies a completed step: counts, tokens, publishing, endings. The hot loop of the host: a few hundred ns a request."""
        size, publishing = self.pool.block_size, self.cache.enabled
        emitted = 0
        ended: list[tuple[Request, str]] = []
        late: set[int] = set()  # index of requests that ended while this step was in flight
        for request, start, length, token in zip(plan.requests, plan.starts, plan.lengths, tokens, strict=True):
            request.num_scheduled_tokens -= length
            request._in_flight -= 1
            if request.state is _RUNNING:
                computed = request.num_computed_tokens = start + length
                if publishing and computed // size > request._published:
                    self.pool.publish(request, computed // size)
            else:
                if not request._in_flight and request.index in self._releasing:
                    del self._releasing[request.index]
                    self._release(request, self._keep.pop(request.index, 0))
                if request.state is not RequestState.PREEMPTED:
                    late.add(request.index)
                    continue
            if token >= 0:
                emitted += 1
                known = request.token_ids
                known.append(token)
                request.token_times.append(now)
                count = len(known)
                if token in request._stop_tokens:
                    request.stop_reason = token
                    ended.append((request, "stop"))
                elif request.sampling.stop and self.stop_text is not None and self.stop_text(request):
                    ended.append((request, "stop"))
                elif count >= request._stop_at:
                    ended.append((request, "stop"))
                elif count >= request._limit:
                    ended.append((request, "length"))
        if late:
            tokens = [-1 if request.index in late else token for request, token in zip(plan.requests, tokens, strict=True)]
        if logprobs is not None:
            for request, token, alternatives in zip(plan.requests, tokens, logprobs, strict=True):
                if token >= 0:
                    request.logprobs.append(alternatives)
        if emitted:
            self.preemptions_since_token = 0
        for request, reason in ended:
            self._finish(request, reason, now)
        return tokens, emitted

    def _finish(self, request: Request, reason: str, now: float) -> None:
        if request.state is _RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)  # its last token came back after it was preempted
        was_running = request.state is _RUNNING
        self._end(request, RequestState.FINISHED, reason, now)
        if was_running:
            self._left.append(request)
        if self.retention is not None and self._holds_its_content(request):
            self.guard.call(self.retention, self.retention.retain, request, self._pins, now)
        self._keep.pop(request.index, None)
        self.owed.pop(request.index, None)
        self._give_back(request)
        self._notify("on_finish", request, now)
        self._follow(request, now)

    def _holds_its_content(self, request: Request) -> bool:
        """Whether there is anything to retain. Whose last token came back after a preemption takes what is left of it in the cache, so that
        its end is like any other."""
        if not request.block_table and self.cache.enabled:
            cached = self._cached_content(request)
            self.pool.acquire(cached, request.tags, hit=False)
            request.block_table, request._published = cached, len(cached)
            request.num_computed_tokens = len(cached) * self.pool.block_size
        return bool(request.block_table)

    def _cached_content(self, request: Request) -> list[int]:
        """The blocks along its tokens that the index holds: its own, and twins that others published first."""
        found: list[int] = self.guard.call(self.cache, self.cache.match, request, [], len(request.token_ids) // self.pool.block_size)
        return found

    def _follow(self, request: Request, now: float) -> None:
        """What a closed loop asks next, after a refused request too: its client goes on."""
        if self.on_result is None:
            return
        source = f"{self._workload.plugin_name}: what follows {request.id}"
        for arrival in self.guard.each(self._workload, self.on_result, request, now):
            self.coming.add(checked(arrival, source, now))

    def _end(self, request: Request, state: RequestState, reason: str, now: float) -> None:
        request.state, request.finish_reason, request.finish_time = state, reason, now
        request.num_tokens = len(request.token_ids)
        self.finished.append(RequestOutput.of(request))
        self._done.append(request)

    def _idle(self, now: float, wake: float | None) -> bool:
        if (self.running.items or self.waiting.items) and wake is None:
            if self._reclaim_idle():
                return True
            raise NothingPlanned(
                "planned nothing although requests wait and nothing is in flight: add one, reject one, or say step.wake_at(t)",
                plugin=self.scheduler.plugin_name, step=self.num_steps, view=self.view.describe(),
            )  # fmt: skip
        if wake is not None:
            wake = self._patiently(now, wake)
        times = [t for t in (wake, self.coming.next_time) if t is not None]
        if not times:
            return False
        self.clock.wait_until(min(times))
        return True

    def _patiently(self, now: float, wake: float) -> float:
        """When the next turn begins for a policy that does nothing until `wake`. Who asks for it at once is given time that grows, so
        that what it waits for may come; who waits for nothing is named."""
        waker = self.builder._waker
        self._idle_turns += 1
        if wake <= now:
            self._turns_at_once += 1
            wake = now + max(math.ulp(now), FIRST_NAP * 2.0**self._turns_at_once)
        if self._turns_at_once > MOST_TURNS_AT_ONCE or self._idle_turns > MOST_IDLE_TURNS:
            message = (
                f"asked {self._idle_turns} times in a row to be woken, {self._turns_at_once} times not after now, and nothing was planned, "
                f"rejected or arrived; now is {now}: let a request start, reject it, or wait until something changes"
            )
            raise self.guard.refusal(waker, message)
        return wake

    def _reclaim_idle(self) -> bool:
        """Nothing could be planned: blocks held for later are given up before that is called an error."""
        return not self.running.items and bool(self._pins or any(r.block_table for r in self.waiting.items)) and self._reclaim(_NOBODY)

    # ---- whole runs ------------------------------------------------------------------------------------------------

    def run(self, arrivals: Iterable[Arrival] = (), on_result: Callable[[Request, float], Iterable[Arrival]] | None = None) -> RunResult:
        """Runs until nothing is left. Ctrl-C and errors end the run but keep what was done; an error is raised again
        with the partial result as its `partial` attribute.

        Arrivals are at seconds since the run began; a list may be in any order, a stream is in order of time. What `on_result` answers is
        at times on the clock, as is all that comes out. The outputs are the result's: the engine forgets them when the next run begins.
        """
        status, problem = "finished", None
        try:
            with interrupts.stepping():
                self._begin(arrivals, on_result)
                while self.step():
                    interrupts.check()
        except KeyboardInterrupt:
            status = "interrupted"
        except BaseException as error:
            if interrupts.caused(error):
                status = "interrupted"
            else:
                status, problem = "failed", self.guard.named(error)
        result = self.result(status, str(problem) if problem else "")
        done, self._done = self._done, []
        for observer in self.observers:  # each of them, also when another one fails: results must not depend on neighbours
            try:
                if done:
                    self.guard.call(observer, observer.on_requests, done)
                self.guard.call(observer, observer.close, result)
            except (Exception, SystemExit) as error:
                problem = problem or error
        if problem is not None:
            problem.partial = result  # type: ignore[attr-defined]
            raise problem
        return result

    def _begin(self, arrivals: Iterable[Arrival], on_result: Callable[[Request, float], Iterable[Arrival]] | None) -> None:
        if not (self.running.items or self.waiting.items or self._inflight):  # else somebody turned the loop by hand, and it goes on
            self._count_anew()
            self._prepared = self.executor.preparation.late
            self.decisions.begin()
            self.clock.readings.clear()
            self.finished = []
            self._ids.clear()
            self._began = self.clock.inner.now() if self._num_runs else 0.0
        self._num_runs += 1
        arrivals = in_order(arrivals, self._workload.plugin_name)
        if any("future" in role.requires for role in self._objects):
            arrivals = self.oracle.future = list(arrivals)
        self._brought.clear()
        if isinstance(arrivals, list):
            self._brought.update(arrival.id for arrival in arrivals if isinstance(arrival.id, str))
        self.on_result = on_result
        self.coming.stream(self.guard.each(self._workload, iter, arrivals), self._workload.plugin_name, self._began)
        self._observe("on_start", self)

    def _count_anew(self) -> None:
        self.num_steps = 0
        self.num_preemptions = 0
        self.planned_tokens = 0
        self.kv_peak = 0
        self.policy_time = 0.0
        self.busy_time = 0.0
        self.pool.num_evictions = 0
        if self.predictor is not None:
            self.predictor.asked = False

    def result(self, status: str = "finished", error: str = "") -> RunResult:
        """What there is so far. Requests still in the system are counted as aborted, and the engine is as new but for its executor."""
        now = self.clock.inner.now()
        cut_off = [*self.running.items, *self.waiting.items]
        for request in cut_off:
            self._end(request, RequestState.ABORTED, status, now)
        if self._rejected:  # at arrival, with no plan after it
            self.builder._reset(self.num_steps, now, 0, 0)
            self.decisions.record(self.builder._build([]), [], self._rejected)
            self._rejected = []
        prepared = self.executor.preparation
        result = RunResult(
            sorted(self.finished, key=lambda o: o.index), now - self._began, self.num_steps, self.policy_time, self.busy_time,
            self.pool.num_blocks, self.kv_peak, self.pool.num_evictions, self.num_preemptions, self.planned_tokens, self.decisions.hexdigest,
            status, error, self.oracles, prepared.seconds, prepared.late - self._prepared, self.executor.step_time_basis, dict(self.derived),
        )  # fmt: skip
        if cut_off or status != "finished":
            self._start_over()
        return result

    def _start_over(self) -> None:
        """After a run that was cut off, wherever that was: nothing in flight, nothing held or cached, nothing to come, policies as at first."""
        self._left += self.running.items
        self._discard_flights()
        for held in (self.running.items, self.waiting.items, self._keep, self.owed, self._releasing):
            held.clear()
        self.coming, self.on_result = Coming(), None
        self.preemptions_since_token = 0
        self._pins.clear()
        self.pool.clear()
        if self._ledger is not None:
            self._ledger = Ledger(self)
        self.view._refresh(self.num_steps, self.view.now, 0)
        self._setup_roles()

    def _discard_flights(self) -> None:
        """Lets the executor finish its steps in the order of launch, until it fails to; their tokens are dropped."""
        flights = [ticket for _, ticket, _, _ in self._inflight]
        self._inflight.clear()
        try:
            for ticket in flights:
                self.clock.advance_to(self.executor.collect(ticket).end)
        except (Exception, KeyboardInterrupt):
            return


_NOBODY = Request(Arrival(0.0, [0]), -1, max_model_len=1, eos_token_ids=frozenset())
