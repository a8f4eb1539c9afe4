"""An executor that stores, instead of KV, which token prefix each slot holds, and fails on the first read of a wrong one.

It needs no model and no GPU, so every scheduler x cache x eviction triple can be driven through thousands of seeds in CI.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from ..clock import VirtualClock
from ..errors import InvariantError
from ..plan import StepPlan
from ..policy import Executor, ExecutorCaps, StepResult
from ..request import Request


class WrongKV(InvariantError):
    """A planned chunk would have read KV that is missing or belongs to another prefix."""


@dataclass
class OracleExecutor(Executor):
    """Checks every read and write of every plan; emits tokens that are a function of (seed, request, position)."""

    vocab_size: int = 5
    max_model_len: int = 64
    num_blocks: int = 16
    step_seconds: float = 0.01
    eos: bool = False  # token 0 ends a sequence
    max_plans: int = 4
    placeholders: bool = True

    def __post_init__(self) -> None:
        eos = frozenset((0,)) if self.eos else frozenset()
        self.caps = ExecutorCaps(self.max_model_len, self.vocab_size, eos, self.placeholders, self.max_plans)
        self.clock = VirtualClock()
        self._slots: dict[int, tuple[int, ...]] = {}  # slot -> the whole token prefix whose KV it holds
        self._tables: dict[int, list[int]] = {}  # request index -> block table, from plans alone
        self._writing: list[set[int]] = []  # blocks written by each step in flight
        self._tokens: dict[int, list[int]] = {}  # request index -> tokens as a device would know them
        self._busy_until = 0.0

    def kv_capacity(self, block_size: int) -> int:
        return self.num_blocks

    def start(self, num_blocks: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int, seed: int) -> None:
        self._size, self._seed, self._total = block_size, seed, num_blocks
        self._max_seqs, self._max_tokens = max_num_seqs, max_num_batched_tokens

    def token(self, request: Request, position: int) -> int:
        digest = blake2b(f"{self._seed}/{request.id}/{position}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little") % self.vocab_size

    def launch(self, plan: StepPlan) -> Any:
        self._update_tables(plan)
        written: set[int] = set()
        sampled: list[int] = []
        seen: set[int] = set()
        for request, start, length, sample in plan.chunks:
            if request.index in seen:
                raise WrongKV(f"step {plan.step}: request {request.id} is planned twice")
            seen.add(request.index)
            self._run_chunk(plan, request, start, length, written)
            sampled.append(self._sample(request, start + length) if sample else -1)
        if len(plan.requests) > self._max_seqs or sum(plan.lengths) > self._max_tokens:
            raise WrongKV(f"step {plan.step}: {len(plan.requests)} requests and {sum(plan.lengths)} tokens exceed the budget")
        self._check_holders(plan)
        start_time = max(self.clock.now(), self._busy_until)
        self._busy_until = start_time + self.step_seconds
        self._writing.append(written)
        return sampled, start_time, self._busy_until

    def collect(self, ticket: Any) -> StepResult:
        sampled, start, end = ticket
        self._writing.pop(0)
        return StepResult(sampled, start, end)

    # ---- what is checked ---------------------------------------------------------------------------------------

    def _update_tables(self, plan: StepPlan) -> None:
        for request in plan.left:
            self._tables.pop(request.index, None)
        for request in plan.admitted:
            # A prefix hit: the table begins with matched blocks that the plan did not allocate.
            grown = sum(len(a.blocks) for a in plan.allocated if a.request is request and a.first)
            self._tables[request.index] = list(request.block_table[: len(request.block_table) - grown])
        for request, first, blocks in plan.allocated:
            table = self._tables.setdefault(request.index, [])
            if first == 0:
                table.clear()
            if len(table) != first:
                raise WrongKV(f"step {plan.step}: request {request.id} allocates table[{first}:] but its table has {len(table)} blocks")
            table.extend(blocks)

    def _run_chunk(self, plan: StepPlan, request: Request, start: int, length: int, written: set[int]) -> None:
        where = f"step {plan.step}, request {request.id}, chunk [{start}, {start + length})"
        table, size = self._tables.get(request.index, []), self._size
        tokens = self._known(request)
        if length < 1 or start + length > len(tokens):
            raise WrongKV(f"{where}: only {len(tokens)} tokens are known")
        if start + length > len(table) * size:
            raise WrongKV(f"{where}: the block table covers {len(table) * size} tokens")
        if table != request.block_table[: len(table)]:
            raise WrongKV(f"{where}: the table was rewritten while it ran: {table} became {request.block_table}")
        for position in range(start):
            slot = table[position // size] * size + position % size
            expected = tuple(tokens[: position + 1])
            if self._slots.get(slot) != expected:
                raise WrongKV(f"{where}: slot {slot} should hold the prefix {expected}, it holds {self._slots.get(slot)}")
        for position in range(start, start + length):
            block = table[position // size]
            if block >= self._total:
                raise WrongKV(f"{where}: block {block} does not exist")
            self._slots[block * size + position % size] = tuple(tokens[: position + 1])
            written.add(block)

    def _known(self, request: Request) -> list[int]:
        """Tokens as the device knows them: those of steps in flight included."""
        tokens = self._tokens.setdefault(request.index, list(request.token_ids))
        if len(request.token_ids) > len(tokens):
            tokens[:] = request.token_ids
        return tokens

    def _sample(self, request: Request, position: int) -> int:
        tokens = self._known(request)
        if position != len(tokens):
            raise WrongKV(f"request {request.id} samples position {position}, but {len(tokens)} tokens are known")
        token = self.token(request, position)
        tokens.append(token)
        return token

    def _check_holders(self, plan: StepPlan) -> None:
        """A block written in this step must not be in the table of any other request of it."""
        owners: dict[int, Sequence[Any]] = {}
        for request, start, length in zip(plan.requests, plan.starts, plan.lengths, strict=True):
            table = self._tables[request.index]
            for i in range(start // self._size, (start + length - 1) // self._size + 1):
                if table[i] in owners:
                    raise WrongKV(f"step {plan.step}: block {table[i]} is written by {owners[table[i]][0]} and {request.id}")
                owners[table[i]] = (request.id,)
        for request in plan.requests:
            for i, block in enumerate(self._tables[request.index]):
                if block in owners and owners[block][0] != request.id:
                    raise WrongKV(f"step {plan.step}: block {block} at table[{i}] of {request.id} is being written by {owners[block][0]}")
