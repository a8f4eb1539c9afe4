"""One case under one composition, with everything checked that can be: KV, references, answers, endings,
progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..compose.config import EngineConfig
from ..decisions import DecisionLog
from ..engine import Engine
from ..errors import HeadwayError, InvariantError, NothingPlanned, PolicyError
from ..executor import Executor
from ..inputs import Arrival
from ..outputs import RunResult
from ..outside import Observer, StepRecord
from ..plan import StepPlan
from ..policy import Role
from ..request import Request, RequestState
from .case import CONTEXT, STEP_SECONDS, VOCAB, Ask, Case, expected_output, feasible
from .oracle import OracleExecutor, WrongKV
from .watch import Mutated, Watch

MOST_BARREN_TURNS = 400  # a prompt computed token by token, preempted a few times, deferred and waited for
MakeRoles = Callable[[Case], dict[str, Role]]


class WrongAnswer(HeadwayError):
    """A request ended with other tokens than its own, not at all, or twice."""


class Livelock(HeadwayError):
    """The loop turns and the work does not get done."""


@dataclass(frozen=True)
class Decision:
    """One planned step as data: equal decisions mean equal steps."""

    step: int
    chunks: tuple[tuple[str, int, int], ...]  # request id, start, length
    allocated: tuple[tuple[str, int, tuple[int, ...]], ...]
    admitted: tuple[str, ...]
    preempted: tuple[str, ...]
    paused: tuple[str, ...]
    evicted: tuple[int, ...]
    rejected: tuple[str, ...]
    now: float = field(compare=False)

    def __str__(self) -> str:
        words = [
            f"[{id} {start}:{start + n}]" + (" starts" if id in self.admitted else "")
            for id, start, n in self.chunks
        ]
        for name, what in (
            ("preempts", self.preempted),
            ("pauses", self.paused),
            ("evicts blocks", self.evicted),
            ("rejects", self.rejected),
        ):
            if what:
                words.append(f"{name} {', '.join(map(str, what))}")
        blocks = [f"{id}[{first}:]={list(ids)}" for id, first, ids in self.allocated]
        return f"step {self.step:<3} t={self.now:.3f}  {' '.join(words) or 'nothing'}" + (
            f"  blocks {' '.join(blocks)}" if blocks else ""
        )


class DecisionTrace(DecisionLog):
    """The decision log, and what went into it."""

    def begin(self) -> None:
        super().begin()
        self.decisions: list[Decision] = []

    def record(self, plan: StepPlan, evicted: Sequence[int], rejected: Sequence[Request]) -> None:
        super().record(plan, evicted, rejected)
        self.decisions.append(
            Decision(
                step=plan.step,
                chunks=tuple(
                    (r.id, s, n) for r, s, n in zip(plan.requests, plan.starts, plan.lengths, strict=True)
                ),
                allocated=tuple((r.id, first, tuple(blocks)) for r, first, blocks in plan.allocated),
                admitted=tuple(r.id for r in plan.admitted),
                preempted=tuple(r.id for r in plan.preempted),
                paused=tuple(r.id for r in plan.paused),
                evicted=tuple(evicted),
                rejected=tuple(r.id for r in rejected),
                now=plan.now,
            )
        )


@dataclass(frozen=True)
class Failure:
    """What went wrong: the check that found it, the error and the steps that led there."""

    check: str
    message: str
    error: str  # the error's type, and the plugin it names: a shrunk case must fail in the same way
    decisions: tuple[Decision, ...] = ()


@dataclass
class Outcome:
    """A case that was run."""

    decision_hash: str
    decisions: list[Decision]
    result: RunResult | None = None
    failure: Failure | None = None
    num_rejected: int = 0  # by a policy, not by the core


class PoolCheck(Observer):
    """After every step: a block's reference count is the number of those who really hold it, and what is
    cached is what it says."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def on_step(self, record: StepRecord) -> None:
        engine = self._engine
        held: Counter[int] = Counter()
        for request in {
            r.index: r
            for r in (*engine.running.items, *engine.waiting.items, *engine.roster.releasing.values())
        }.values():
            held.update(request.block_table)
            held.update(request.canonical_blocks.values())
        held.update(engine.roster.pins.held)
        for block in engine.pool.blocks:
            if block.ref_count != held[block.id]:
                raise InvariantError(f"step {record.step}: {block} is held by {held[block.id]}")
        if isinstance(engine.executor, OracleExecutor):
            engine.executor.check_cached(engine.pool)


class FreshMatch:
    """`View.match`, checked against an index that is asked without the memo of the last match."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._match = engine, engine.view.match
        engine.view.match = self  # type: ignore[method-assign]

    def __call__(self, request: Request) -> Any:
        answer = self._match(request)
        cache, engine = self._engine.roles.cache, self._engine
        if cache.enabled and not request.block_table:
            limit = (request.num_tokens - 1) // engine.pool.block_size
            fresh = cache.match(request, [], limit)
            if list(answer.blocks) != fresh:
                raise InvariantError(
                    f"request {request.id}: the remembered match {list(answer.blocks)} is not what the cache "
                    f"holds, {fresh}"
                )
        return answer


class Trial(Observer):
    """A case, ready to run."""

    def __init__(
        self,
        case: Case,
        make_roles: MakeRoles,
        *,
        watch: Watch | None = None,
        executor: Executor | None = None,
    ) -> None:
        self.case, self._make_roles, self._watch, self._executor = case, make_roles, watch, executor
        self.engine: Engine | None = None
        self._emitted = 0  # tokens so far

    def run(self) -> Outcome:
        """Never raises for what a policy did: that is the outcome's failure."""
        try:
            result = self._run()
            rejected = self._check(result)
        except Exception as error:
            engine = self.engine
            decisions = _trace(engine).decisions if engine else []
            failure = Failure(
                _check_of(error),
                str(error),
                f"{type(error).__name__} {getattr(error, 'plugin', '')}",
                tuple(decisions),
            )
            return Outcome("", decisions, None, failure)
        return Outcome(
            result.decision_hash, _trace(self.engine).decisions, result, None, num_rejected=rejected
        )

    def _run(self) -> RunResult:
        case, executor = self.case, self._executor
        roles = self._make_roles(case)
        if executor is None:
            executor = OracleExecutor(
                VOCAB,
                CONTEXT,
                case.num_blocks,
                STEP_SECONDS,
                case.token_seconds,
                case.eos,
                4,
                case.placeholders,
            )
        roles["executor"] = executor
        if self._watch:
            self._watch.over(roles)
        config = EngineConfig(
            block_size=case.block_size,
            num_blocks=case.num_blocks,
            max_num_seqs=case.max_num_seqs,
            max_num_batched_tokens=case.max_num_batched_tokens,
            max_inflight=case.max_inflight,
            max_model_len=None,
            check=True,
        )
        self.engine = engine = Engine(roles, config, seed=case.seed)
        engine.observers += [PoolCheck(engine), self]
        engine.decisions = DecisionTrace()
        FreshMatch(engine)
        if self._watch:
            self._watch.attach(engine)
        self._count_turns(engine)
        return engine.run((a.arrival() for a in case.asks), self._follow)

    def _count_turns(self, engine: Engine) -> None:
        """Stops the run at `stop_after`, and when the loop turns and no token and no ending comes of it."""
        turn, barren, ended, step = 0, 0, 0, engine.step

        def counted() -> bool:
            nonlocal turn, barren, ended
            turn += 1
            if turn == self.case.stop_after:
                raise KeyboardInterrupt
            progress = self._emitted + len(engine.roster.finished)
            barren, ended = (barren + 1, ended) if progress == ended else (0, progress)
            if barren > MOST_BARREN_TURNS:
                running, waiting = (
                    [r.id for r in items] for items in (engine.running.items, engine.waiting.items)
                )
                raise Livelock(
                    f"{barren} turns of the loop and no token came out and no request ended: {running} run, "
                    f"{waiting} wait"
                )
            return step()

        engine.step = counted  # type: ignore[method-assign]

    def on_step(self, record: StepRecord) -> None:
        self._emitted += record.emitted

    def _follow(self, request: Request, now: float) -> Iterator[Arrival]:
        ask = next(a for a in self.case.asks if a.id == request.tags.session)
        if request.state is RequestState.FINISHED and (
            arrival := ask.following(request.tags.turn + 1, request.token_ids, now)
        ):
            yield arrival

    # ---- the end ------------------------------------------------------------------------------------------

    def _check(self, result: RunResult) -> int:
        engine = self.engine
        assert engine is not None
        interrupted = result.status != "finished"
        if len(result.outputs) != engine.intake.num_requests:
            raise WrongAnswer(
                f"{engine.intake.num_requests} requests arrived and {len(result.outputs)} have an outcome"
            )
        engine.pool.check()
        rejected = self._check_answers(result, interrupted)
        if not interrupted:
            engine.roster.pins.expire(float("inf"))
            roster = engine.roster
            if (
                engine.pool.num_used
                or roster.releasing
                or roster.reserved_blocks
                or roster.kept_heads
                or roster.paused
            ):
                raise InvariantError(
                    f"all requests have ended, and {engine.pool.num_used} blocks are still held"
                )
        return rejected

    def _check_answers(self, result: RunResult, interrupted: bool) -> int:
        outputs = {o.id: o for o in result.outputs}
        expected = 0
        rejected = 0
        for ask in self.case.asks:
            for id, prompt, max_tokens, output_len in self._asked(ask, outputs):
                output = outputs.get(id)
                if output is None:
                    if interrupted:
                        break
                    raise WrongAnswer(f"request {id} never arrived")
                expected += 1
                possible = feasible(self.case, prompt, max_tokens, output_len)
                if output.state == "rejected":
                    rejected += possible
                    break
                if not possible:
                    raise WrongAnswer(f"request {id} can never run and was taken")
                tokens = expected_output(self.case, id, len(prompt), max_tokens, output_len=output_len)
                if output.state != "finished" and not interrupted:
                    raise WrongAnswer(f"request {id} is {output.state} at the end of the run")
                if output.output_token_ids != (
                    tokens if output.state == "finished" else tokens[: len(output.output_token_ids)]
                ):
                    raise WrongAnswer(f"request {id} got {output.output_token_ids}, its tokens are {tokens}")
                if output.num_cached_tokens >= len(prompt):
                    raise WrongAnswer(
                        f"request {id} counts {output.num_cached_tokens} of {len(prompt)} prompt tokens as "
                        "cached"
                    )
                if (
                    len(output.token_times) != len(output.output_token_ids)
                    or sorted(output.token_times) != output.token_times
                ):
                    raise WrongAnswer(
                        f"request {id}: token times {output.token_times} of {len(output.output_token_ids)} "
                        "tokens"
                    )
                self._check_cached(output.id, output.num_cached_tokens)
        if expected != len(outputs):
            raise WrongAnswer(f"{len(outputs)} outcomes, expected {expected}")
        return rejected

    def _check_cached(self, id: str, cached: int) -> None:
        """A hit is what the first admission found; nothing recomputed later counts."""
        first = next((d for d in _trace(self.engine).decisions if id in d.admitted), None)
        if first and cached != next(start for other, start, _ in first.chunks if other == id):
            raise WrongAnswer(
                f"request {id} counts {cached} cached tokens, its first admission (step {first.step}) found "
                "another number"
            )

    def _asked(self, ask: Ask, outputs: dict[str, Any]) -> Iterator[tuple[str, list[int], int, int | None]]:
        yield ask.id, list(ask.prompt), ask.max_tokens, ask.output_len
        conversation = list(ask.prompt)
        before = ask.id
        for i, turn in enumerate(ask.turns, 1):
            if before not in outputs or outputs[before].state != "finished":
                return
            conversation += [*outputs[before].output_token_ids, *turn.tokens]
            before = f"{ask.id}.{i}"
            yield before, list(conversation), turn.max_tokens, None


def _trace(engine: Engine | None) -> DecisionTrace:
    log = engine.decisions if engine else None
    return log if isinstance(log, DecisionTrace) else DecisionTrace()


def _check_of(error: Exception) -> str:
    """The row of the report that an error belongs to."""
    if isinstance(error, Mutated):
        return "read-only"
    if isinstance(error, WrongKV):
        return "kv oracle"
    if isinstance(error, (Livelock, NothingPlanned)):
        return "progress"
    if isinstance(error, WrongAnswer):
        return "answers"
    if isinstance(error, PolicyError) and error.__cause__ is None:  # else the policy raised what it wraps
        return "invariants"
    return "invariants" if isinstance(error, InvariantError) else "exceptions"
