"""A second set of books (`engine.check=true`): what every request must be, from arrivals, plans and results
alone.

Policies read requests and never write them, and nothing in Python stops one that does. After every plan and
every completed step each request is compared with what the ledger says, so that a policy that changed one is
found on every executor, before a token of it is used. It keeps the core honest, too: counts and tables are
worked out here in another way. O(tokens in the system) per step.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from .errors import PolicyError
from .execution import Tokens
from .plan import StepPlan
from .request import Request, RequestState

if TYPE_CHECKING:
    from .blocks import BlockPool
    from .roles import Roles
    from .roster import Roster

GIVEN = (
    "id",
    "index",
    "arrival_time",
    "sort_key",
    "sampling",
    "tags",
    "slo",
    "cache_salt",
    "prompt",
    "num_prompt_tokens",
    "max_num_tokens",
    "stop_tokens",
    "waits_for_token",
)
_given = attrgetter(*GIVEN)


class Mutated(PolicyError):
    """A policy changed a request, a block or the step behind the core's back."""


@dataclass
class _Account:
    """What is known of one request."""

    given: tuple[Any, ...]
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)  # of its table, as last allocated
    # (tokens, does it sample, drafts) of each step
    in_flight: deque[tuple[int, bool, int]] = field(default_factory=deque)
    next_position: int = 0  # since its admission
    num_admissions: int = 0
    num_preemptions: int = 0
    paused: bool = False
    num_cached: int = 0  # tokens, at its first admission
    computed: set[int] = field(default_factory=set)  # positions that were ever planned
    num_recomputed: int = 0
    ran_elsewhere: bool = False  # before it was attached


class Ledger:
    def __init__(self, roster: Roster, pool: BlockPool, roles: Roles) -> None:
        self._roster, self._pool, self._roles = roster, pool, roles
        self.accounts: dict[int, _Account] = {}  # request index -> its account, while it is in the system

    def clear(self) -> None:
        """Nobody is in the system any more."""
        self.accounts = {}

    # ---- what happened ------------------------------------------------------------------------------------

    def arrived(self, request: Request) -> None:
        self.accounts[request.index] = _Account(
            given=_given(request),
            tokens=list(request.token_ids),
            blocks=list(request.block_table),
            num_preemptions=request.num_preemptions,
            num_cached=request.num_cached_tokens,
            num_recomputed=request.num_recomputed_tokens,
            ran_elsewhere=request.first_scheduled_time >= 0,
        )

    def planned(self, plan: StepPlan) -> None:
        for request in plan.paused:
            self.accounts[request.index].paused = True
        for request in plan.preempted:
            account = self.accounts[request.index]
            account.num_preemptions, account.paused = account.num_preemptions + 1, False
        for request in plan.admitted:
            account = self.accounts[request.index]
            account.num_admissions, account.paused = account.num_admissions + 1, False
            account.blocks.clear()
        for request, first, blocks in plan.allocated:
            self.accounts[request.index].blocks[first:] = blocks
        admitted = {request.index for request in plan.admitted}
        chunks = (plan.requests, plan.starts, plan.lengths, plan.samples)
        for place, (request, start, length, sample) in enumerate(zip(*chunks, strict=True)):
            account = self.accounts[request.index]
            if request.index in admitted and account.num_admissions == 1 and not account.ran_elsewhere:
                account.num_cached = start
            drafts = len(plan.drafts.get(place, ()))
            known = range(start, start + length - drafts)
            account.num_recomputed += sum(p in account.computed for p in known)
            account.computed.update(known)
            account.next_position = start + length
            account.in_flight.append((length, sample, drafts))
        self.verify(f"while step {plan.step} was planned", plan.step)

    def collected(self, plan: StepPlan, tokens: Tokens) -> None:
        for request, new in zip(plan.requests, tokens, strict=True):
            if (account := self.accounts.get(request.index)) is not None:
                _, _, drafts = account.in_flight.popleft()
                if drafts and request.state in (RequestState.RUNNING, RequestState.PAUSED):
                    right = min(drafts, len(new) - 1)
                    account.next_position -= drafts - right
                    account.computed.update(range(account.next_position - right, account.next_position))
                account.tokens += new
        self.verify(f"after step {plan.step} had come back", plan.step)

    # ---- the comparison -----------------------------------------------------------------------------------

    def verify(self, when: str, step: int) -> None:
        """Raises Mutated for the first request that is not what the books say."""
        present: dict[int, _Account] = {}
        for items, runs in ((self._roster.running.items, True), (self._roster.waiting.items, False)):
            for request in items:
                account = present[request.index] = self.accounts[request.index]
                for name, expected in self._expected(request, account, runs).items():
                    if getattr(request, name) != expected:
                        message = self._mutated(request, name, expected, when)
                        raise Mutated(message, step=step, request=request.id)
        self.accounts = present

    def _expected(self, request: Request, account: _Account, runs: bool) -> dict[str, Any]:
        scheduled = sum(length for length, _, _ in account.in_flight)
        expected = dict(zip(GIVEN, account.given, strict=True)) | {
            "token_ids": account.tokens,
            "num_tokens": len(account.tokens) + sum(sample for _, sample, _ in account.in_flight),
            "num_scheduled_tokens": scheduled,
            "num_admissions": account.num_admissions,
            "num_preemptions": account.num_preemptions,
            "num_cached_tokens": account.num_cached,
            "num_recomputed_tokens": account.num_recomputed,
        }
        if runs or account.paused:
            return expected | {
                "state": RequestState.RUNNING if runs else RequestState.PAUSED,
                "block_table": account.blocks,
                "num_computed_tokens": account.next_position - scheduled,
            }
        was_there = account.num_admissions or account.ran_elsewhere
        expected["state"] = RequestState.PREEMPTED if was_there else RequestState.WAITING
        expected["block_table"] = account.blocks[: len(request.block_table)]
        if not account.in_flight:
            expected["num_computed_tokens"] = self._pool.layout.num_tokens(len(request.block_table))
        return expected

    def _mutated(self, request: Request, name: str, expected: Any, when: str) -> str:
        roles = self._roles.given.items()
        policies = ", ".join(role.plugin_name for node, role in roles if node not in ("executor", "workload"))
        return (
            f"{name} is {getattr(request, name)!r}, and from arrivals, plans and results it is {expected!r}: "
            f"a policy ({policies}) changed {when} what it may only read; `python -m headway check` finds "
            "out which"
        )
