"""A second set of books (`engine.check=true`): what every request must be, from arrivals, plans and results alone.

Policies read requests and never write them, and nothing in Python stops one that does. After every plan and every completed step each
request is compared with what the ledger says, so that a policy that changed one is found on every executor, before a token of it is used.
It keeps the core honest, too: counts and tables are worked out here in another way. O(tokens in the system) a step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from .errors import PolicyError
from .plan import StepPlan
from .request import Request, RequestState

if TYPE_CHECKING:
    from .engine import Engine
    from .step import StepBuilder

GIVEN = (
    "id", "index", "arrival_time", "sort_key", "sampling", "tags", "slo", "cache_salt", "prompt", "num_prompt_tokens",
    "_limit", "_stop_at", "_stop_tokens",
)  # fmt: skip
_given = attrgetter(*GIVEN)


class Mutated(PolicyError):
    """A policy changed a request, a block or the step behind the core's back."""


@dataclass
class _Account:
    """What is known of one request."""

    given: tuple[Any, ...]
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)  # of its table, as last allocated
    in_flight: deque[tuple[int, bool]] = field(default_factory=deque)  # (tokens, does it sample) of each step in flight
    next_position: int = 0  # since its admission
    num_preemptions: int = 0
    num_cached: int = 0  # tokens, at its first admission
    computed: set[int] = field(default_factory=set)  # positions that were ever planned
    num_recomputed: int = 0


class Ledger:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._accounts: dict[int, _Account] = {}  # request index -> its account, while it is in the system

    # ---- what happened -------------------------------------------------------------------------------------------

    def arrived(self, request: Request) -> None:
        self._accounts[request.index] = _Account(_given(request), list(request.token_ids))

    def planned(self, builder: StepBuilder) -> None:
        for request in builder._preempted:
            self._accounts[request.index].num_preemptions += 1
        for request in builder._admitted:
            self._accounts[request.index].blocks.clear()
        for request, first, blocks in builder._allocated:
            self._accounts[request.index].blocks[first:] = blocks
        admitted = {request.index for request in builder._admitted}
        for request, start, length, sample in zip(builder._requests, builder._starts, builder._lengths, builder._samples, strict=True):
            account = self._accounts[request.index]
            if request.index in admitted and not account.num_preemptions:
                account.num_cached = start
            account.num_recomputed += sum(p in account.computed for p in range(start, start + length))
            account.computed.update(range(start, start + length))
            account.next_position = start + length
            account.in_flight.append((length, sample))
        self.verify(f"while step {builder.step} was planned")

    def collected(self, plan: StepPlan, tokens: Sequence[int]) -> None:
        for request, token in zip(plan.requests, tokens, strict=True):
            if (account := self._accounts.get(request.index)) is not None:
                account.in_flight.popleft()
                if token >= 0:
                    account.tokens.append(token)
        self.verify(f"after step {plan.step} had come back")

    # ---- the comparison ------------------------------------------------------------------------------------------

    def verify(self, when: str) -> None:
        """Raises Mutated for the first request that is not what the books say."""
        engine = self._engine
        present: dict[int, _Account] = {}
        for items, runs in ((engine.running.items, True), (engine.waiting.items, False)):
            for request in items:
                account = present[request.index] = self._accounts[request.index]
                for name, expected in self._expected(request, account, runs).items():
                    if getattr(request, name) != expected:
                        raise self._mutated(request, name, expected, when)
        self._accounts = present

    def _expected(self, request: Request, account: _Account, runs: bool) -> dict[str, Any]:
        scheduled = sum(length for length, _ in account.in_flight)
        expected = dict(zip(GIVEN, account.given, strict=True)) | {
            "token_ids": account.tokens,
            "num_tokens": len(account.tokens) + sum(sample for _, sample in account.in_flight),
            "num_scheduled_tokens": scheduled,
            "num_preemptions": account.num_preemptions,
            "num_cached_tokens": account.num_cached,
            "num_recomputed_tokens": account.num_recomputed,
        }
        if runs:
            return expected | {
                "state": RequestState.RUNNING,
                "block_table": account.blocks,
                "num_computed_tokens": account.next_position - scheduled,
            }
        expected["state"] = RequestState.PREEMPTED if account.num_preemptions else RequestState.WAITING
        expected["block_table"] = account.blocks[: len(request.block_table)]
        if not account.in_flight:
            expected["num_computed_tokens"] = len(request.block_table) * self._engine.pool.block_size
        return expected

    def _mutated(self, request: Request, name: str, expected: Any, when: str) -> Mutated:
        policies = [role.plugin_name for node, role in self._engine.roles.items() if node not in ("executor", "workload")]
        return Mutated(
            f"{name} is {getattr(request, name)!r}, and from arrivals, plans and results it is {expected!r}: a policy ({', '.join(policies)}) "
            f"changed {when} what it may only read; `python -m headway check` finds out which",
            step=self._engine.view.step,
            request=request.id,
        )
