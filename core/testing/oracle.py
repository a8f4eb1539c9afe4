"""An executor that stores, instead of KV, which token prefix each slot holds, and fails on the first read of
a wrong one.

It needs no model and no GPU, so every scheduler x cache x eviction triple can be driven through thousands of
seeds in CI.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from ..blocks import ROOT, BlockPool
from ..clock import VirtualClock, VirtualServer
from ..compose.params import param
from ..errors import InvariantError
from ..execution import ExecutorCaps, StepResult
from ..executor import Executor
from ..plan import KVCopy, StepPlan
from ..request import Request


class WrongKV(InvariantError):
    """A planned chunk would have read KV that is missing or belongs to another prefix, or broken what a step
    in flight uses."""


class Prefixes:
    """Every token prefix as one number: equal numbers are equal prefixes. A trie, so nothing rests on a
    hash."""

    def __init__(self) -> None:
        self._ids: dict[tuple[Any, Any], int] = {}
        self._back: list[tuple[Any, Any]] = []  # number -> (number of the prefix before, token)

    def extend(self, before: Any, token: Any) -> int:
        id = self._ids.setdefault((before, token), len(self._back))
        if id == len(self._back):
            self._back.append((before, token))
        return id

    def before(self, id: int | None) -> Any:
        """The prefix without its last token."""
        return None if id is None else self._back[id][0]

    def is_root(self, id: Any) -> bool:
        """Whether it is the empty prefix (of one cache_salt)."""
        return isinstance(id, int) and not isinstance(self._back[id][0], int)

    def path(self, id: int | None) -> tuple[Any, tuple[int, ...]] | None:
        """Salt and tokens of the prefix."""
        found: list[Any] = []
        at: Any = id
        while isinstance(at, int):
            at, token = self._back[at]
            found.append(token)
        return None if id is None else (at, tuple(found[-2::-1]))

    def tokens(self, id: int | None) -> str:
        """The prefix in words, for an error."""
        if id is None:
            return "nothing"
        found: list[Any] = []
        at: Any = id
        while isinstance(at, int):
            at, token = self._back[at]
            found.append(token)
        return f"{at or 'KV'} of {found[-2::-1]}"


@dataclass
class _Flight:
    """A launched step that has not come back: the blocks it writes, and those it reads, by request index."""

    step: int
    writes: dict[int, int]
    reads: dict[int, int]


@dataclass
class OracleExecutor(Executor):
    """Checks every read and write of every plan; emits tokens that are a function of (seed, request,
    position)."""

    vocab_size: int = param(5, min=1, max=2**24)
    max_model_len: int = param(64, min=1, max=2**24, unit="tokens")
    num_blocks: int = param(16, min=0, max=2**31 - 1)
    step_seconds: float = param(0.01, min=0, max=1e6, unit="seconds")
    token_seconds: float = param(0.0, min=0, max=1e6, unit="seconds", doc="added for each token of the plan")
    eos: bool = False  # token 0 ends a sequence
    max_plans: int = param(4, min=1, max=1024)
    placeholders: bool = True
    tokens_per_step: int = param(
        1, min=1, max=64, doc="given to a request that samples, where it has room for them"
    )
    max_drafts: int = param(0, min=0, max=64, doc="verified with one request's next token")
    tier_blocks: tuple[int, ...] = param((), min=0, max=2**31 - 1, doc="of each tier behind the pool")

    def __post_init__(self) -> None:
        eos = frozenset((0,)) if self.eos else frozenset()
        self.caps = ExecutorCaps(
            self.max_model_len,
            self.vocab_size,
            eos,
            self.placeholders,
            max_inflight=self.max_plans,
            tokens_per_step=self.tokens_per_step,
            max_drafts=self.max_drafts,
            tier_blocks=self.tier_blocks,
        )
        self.clock = VirtualClock()
        self.cost_model = self
        self._prefixes = Prefixes()
        self._slots: dict[int, int] = {}  # slot -> number of the token prefix whose KV it holds
        self._tiers = [self._slots, *({} for _ in self.tier_blocks)]  # the same of every tier
        self._tables: dict[int, list[int]] = {}  # request index -> block table, from plans alone
        self._flights: list[_Flight] = []
        self._tokens: dict[int, list[int]] = {}  # request index -> tokens as a device would know them
        self._known: dict[int, list[int]] = {}  # request index -> prefix number at each position
        self.server = VirtualServer(self.clock)

    def kv_capacity(self, block_size: int) -> int:
        return self.num_blocks

    def step_time(self, starts: Sequence[int], lengths: Sequence[int]) -> float:
        return self.step_seconds + self.token_seconds * sum(lengths)

    def start(
        self, num_blocks: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int, seed: int
    ) -> None:
        self._size, self._seed, self._total = block_size, seed, num_blocks
        self._max_seqs, self._max_tokens = max_num_seqs, max_num_batched_tokens

    def token(self, request_id: str, position: int) -> int:
        """What is sampled at a position, whatever the batch: an expected answer can be worked out without a
        run."""
        return sampled_token(self._seed, request_id, position, self.vocab_size)

    def launch(self, plan: StepPlan) -> Any:
        if len(plan.requests) > self._max_seqs or sum(plan.lengths) > self._max_tokens:
            raise WrongKV(
                f"step {plan.step}: {len(plan.requests)} requests and {sum(plan.lengths)} tokens exceed the "
                "budget"
            )
        if len({r.index for r in plan.requests}) != len(plan.requests):
            raise WrongKV(f"step {plan.step}: a request is planned twice: {[r.id for r in plan.requests]}")
        self._update_tables(plan)
        for copy in plan.copies:
            self._copy(plan, copy)
        flight = self._flight(plan)
        sampled = []
        for request, start, length, sample, drafts in plan.chunks:
            self._run_chunk(plan, request, start, length, drafts)
            end = start + length - len(drafts)
            if sample != (end == len(self._device_tokens(request))) or (drafts and not sample):
                raise WrongKV(
                    f"step {plan.step}, request {request.id}: sample={sample}, but its chunk ends at {end}"
                )
            sampled.append(self._sample(request, end, drafts) if sample else [])
        self._flights.append(flight)
        return sampled, *self.server.serve(self.step_time(plan.starts, plan.lengths))

    def collect(self, ticket: Any) -> StepResult:
        sampled, start, end = ticket
        self._flights.pop(0)
        return StepResult(sampled, start, end)

    def read_blocks(self, blocks: Sequence[int]) -> list[list[tuple[Any, tuple[int, ...]] | None]]:
        """Of each slot the salt and the tokens of its prefix, which mean the same to every oracle."""
        size, path = self._size, self._prefixes.path
        return [[path(self._slots.get(block * size + i)) for i in range(size)] for block in blocks]

    def write_blocks(self, blocks: Sequence[int], content: Any, first: int) -> None:
        for block, held in zip(blocks, content[first:], strict=False):
            if any(block in flight.writes or block in flight.reads for flight in self._flights):
                raise WrongKV(f"block {block} is written while a step in flight uses it")
            for i, path in enumerate(held):
                self._slots.pop(block * self._size + i, None)
                if path is not None:
                    salt, tokens = path
                    before: Any = self._prefixes.extend(salt, "root")
                    for token in tokens:
                        before = self._prefixes.extend(before, token)
                    self._slots[block * self._size + i] = before

    def check_cached(self, pool: BlockPool) -> None:
        """Every cached block holds what continues its parent. Raises WrongKV."""
        size, slots, before = self._size, self._slots, self._prefixes.before
        for block in pool.blocks:
            if not block.cached:
                continue
            held = [slots.get(block.id * size + i) for i in range(size)]
            above = [before(h) for h in held]
            start = slots.get(block.parent * size + size - 1) if block.parent != ROOT else above[0]
            if (
                None in held
                or [start, *held[:-1]] != above
                or (block.parent == ROOT and not self._prefixes.is_root(start))
            ):
                holds = ", ".join(map(self._prefixes.tokens, held))
                raise WrongKV(
                    f"{block} is cached, but does not continue its parent: it holds {holds}; its parent ends "
                    f"with {self._prefixes.tokens(start)}"
                )

    # ---- what is checked ----------------------------------------------------------------------------------

    def _update_tables(self, plan: StepPlan) -> None:
        for request in plan.left:
            self._tables.pop(request.index, None)
        for request in plan.admitted:
            self._tables[request.index] = []
        for request, first, blocks in plan.allocated:
            table = self._tables.setdefault(request.index, [])
            if len(table) != first:
                raise WrongKV(
                    f"step {plan.step}: request {request.id} allocates table[{first}:] but its table has "
                    f"{len(table)} blocks"
                )
            table.extend(blocks)

    def _flight(self, plan: StepPlan) -> _Flight:
        """What the step touches, checked against itself and against the steps in flight.

        A written block is in no other request's table; a read block is written by no other. This holds across
        steps in flight too: they may not have run yet, so that publishing or reusing their blocks is too
        early.
        """
        size = self._size
        writes: dict[int, int] = {}
        reads: dict[int, int] = {}
        for request, start, length in zip(plan.requests, plan.starts, plan.lengths, strict=True):
            table = self._tables.get(request.index, [])
            if start + length > len(table) * size:
                raise WrongKV(
                    f"step {plan.step}, request {request.id}, chunk [{start}, {start + length}): the block "
                    f"table covers {len(table) * size} tokens"
                )
            for block in table[start // size : (start + length - 1) // size + 1]:
                if writes.setdefault(block, request.index) != request.index:
                    raise WrongKV(
                        f"step {plan.step}: block {block} is written by request {request.id} and by another "
                        "of the same step"
                    )
            for block in table[: -(-start // size)]:
                reads.setdefault(block, request.index)
        for step, earlier_writes, earlier_reads in [
            (plan.step, writes, {}),
            *((f.step, f.writes, f.reads) for f in self._flights),
        ]:
            for request, start, length in zip(plan.requests, plan.starts, plan.lengths, strict=True):
                index, table = request.index, self._tables[request.index]
                for block in table[: -(-(start + length) // size)]:
                    if earlier_writes.get(block, index) != index:
                        raise WrongKV(
                            f"step {plan.step}: request {request.id} uses block {block}, which another "
                            f"request writes in step {step} in flight"
                        )
            for block, index in writes.items():
                if earlier_reads.get(block, index) != index:
                    raise WrongKV(
                        f"step {plan.step}: block {block} is written again while step {step} in flight still "
                        "reads it"
                    )
        return _Flight(plan.step, writes, reads)

    def _copy(self, plan: StepPlan, copy: KVCopy) -> None:
        """Moves what a block holds; nothing of a step in flight may be written over."""
        source, target, size = self._tiers[copy.source_tier], self._tiers[copy.target_tier], self._size
        moved = [source.get(copy.source * size + i) for i in range(size)]
        if moved[0] is None:
            raise WrongKV(f"step {plan.step}: {copy} reads a block that holds nothing")
        for flight in self._flights:
            if not copy.target_tier and (copy.target in flight.writes or copy.target in flight.reads):
                raise WrongKV(
                    f"step {plan.step}: {copy} writes over a block that step {flight.step} in flight uses"
                )
        for i, held in enumerate(moved):
            target.pop(copy.target * size + i, None)
            if held is not None:
                target[copy.target * size + i] = held

    def _run_chunk(
        self, plan: StepPlan, request: Request, start: int, length: int, drafts: Sequence[int]
    ) -> None:
        table, size, slots = self._tables[request.index], self._size, self._slots
        tokens = self._device_tokens(request)
        where = f"step {plan.step}, request {request.id}, chunk [{start}, {start + length})"
        if length <= len(drafts) or start + length - len(drafts) > len(tokens):
            raise WrongKV(f"{where}: only {len(tokens)} tokens are known")
        if table != request.block_table[: len(table)]:
            raise WrongKV(
                f"{where}: the table was rewritten while it ran: {table} became {request.block_table}"
            )
        if max(table) >= self._total:
            raise WrongKV(f"{where}: block {max(table)} does not exist")
        prefix = self._prefix(request, tokens)
        if drafts:
            prefix = prefix[: len(tokens)]
            for token in drafts:
                prefix.append(self._prefixes.extend(prefix[-1], token))
        for position in range(start):
            slot = table[position // size] * size + position % size
            if slots.get(slot) != prefix[position]:
                held = self._prefixes.tokens(slots.get(slot))
                raise WrongKV(
                    f"{where}: slot {slot} should hold {self._prefixes.tokens(prefix[position])}, it holds "
                    f"{held}"
                )
        for position in range(start, start + length):
            slots[table[position // size] * size + position % size] = prefix[position]

    def _prefix(self, request: Request, tokens: list[int]) -> list[int]:
        known = self._known.setdefault(request.index, [])
        before: Any = known[-1] if known else self._prefixes.extend(request.cache_salt, "root")
        for token in tokens[len(known) :]:
            before = self._prefixes.extend(before, token)
            known.append(before)
        return known

    def _device_tokens(self, request: Request) -> list[int]:
        """Tokens as the device knows them: those of steps in flight included."""
        tokens = self._tokens.setdefault(request.index, list(request.token_ids))
        if tokens[: len(request.token_ids)] != request.token_ids:
            raise WrongKV(
                f"request {request.id}: the engine's tokens {request.token_ids} are not those that were "
                f"sampled, {tokens}"
            )
        return tokens

    def _sample(self, request: Request, position: int, drafts: Sequence[int]) -> list[int]:
        """The tokens at this position and behind it that a request is given in one step: one more for each
        draft that is right, up to the first that is not. Nothing is sampled past its limit."""
        tokens = self._tokens[request.index]
        most = request.sampling.max_tokens
        longest = min(
            self.max_model_len, request.num_prompt_tokens + (most if most is not None else self.max_model_len)
        )
        if position >= longest:
            raise WrongKV(
                f"request {request.id} samples position {position}, past its max_tokens={most} or the "
                f"context of {self.max_model_len}"
            )
        right = 0
        while right < len(drafts) and drafts[right] == self.token(request.id, position + right):
            right += 1
        last = min(longest, position + right + self.tokens_per_step)
        new = [self.token(request.id, at) for at in range(position, last)]
        tokens += new
        return new


def sampled_token(seed: int, request_id: str, position: int, vocab_size: int) -> int:
    digest = blake2b(f"{seed}/{request_id}/{position}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % vocab_size
