"""From a StepPlan to one buffer of integers: what has to be sent to the device, and nothing else.

Each running request has a row of device state (block table, last token, length, sampling parameters) from its
admission until it leaves. A step of decodes sends new block ids only, and the rows when the batch is another
than before; any other step sends its tokens, positions and rows too. Everything goes in one int32 buffer, so
a step costs one copy; on several ranks the same buffer is what the driver broadcasts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from headway import Request, StepPlan

GREEDY, RANDOM, FILTERED = 0, 1, 2  # how much of sampling a batch needs: the largest of its rows
# int32 words a row: temperature, top_p, min_p (float32 bits), top_k, seed (int64: low word, high word)
PARAMETERS = 6
NO_LOGPROBS = -1


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step as a runner needs it. `data` int32 holds these sections, in this order:

    updates      [2, num_updates]         place in the block tables of all rows, one after the other; block id
    admissions   [num_admitted, 1 + 6]    row, sampling parameters
    samples      [num_samples]            which chunks sample; absent from a decode
    rows         [num_seqs]               of a decode padded to all rows, and absent when they are the
                 `same_rows`
    and unless decode:
    starts       [num_seqs]               first position of each chunk
    bounds       [num_seqs + 1]           token offsets of chunks
    tokens       [num_tokens]             ids; -1: the row's last sampled token, still on the device
    owners       [num_tokens]             chunk of each token
    """

    data: np.ndarray
    decode: bool  # every row computes one token that it sampled before, and samples the next
    same_rows: bool
    num_seqs: int
    num_tokens: int
    num_samples: int
    num_updates: int
    num_admitted: int
    max_query: int
    max_context: int
    sampling: int  # GREEDY, RANDOM or FILTERED
    logprobs: int  # most alternatives that a row wants; NO_LOGPROBS: no row wants any
    sampled: list[int] | None  # plan indices of the chunks that sample; None: all
    # of KV blocks, before the step; four numbers each (core.plan.KVCopy) at the end of `data`
    num_copies: int = 0

    def without_copies(self) -> tuple[StepInput, list[list[int]]]:
        """The step itself, and the copies that come before it."""
        front = len(self.data) - 4 * self.num_copies
        return replace(self, data=self.data[:front], num_copies=0), self.data[front:].reshape(-1, 4).tolist()

    @property
    def num_told(self) -> int:
        """Numbers at the front of `data` that are about rows: updates and admissions."""
        return 2 * self.num_updates + (1 + PARAMETERS) * self.num_admitted

    def padded(self, num_seqs: int, num_tokens: int, padding_row: int) -> np.ndarray:
        """`data` of a step that is no decode, filled up to so many sequences and tokens, and to `padding_row`
        samples.

        Sequences of padding have no token and a row that belongs to no request, the last one at least; tokens
        of padding lie past its end, and samples of padding are its."""
        n, total, samples = self.num_seqs, self.num_tokens, self.num_samples
        front = self.num_told + samples
        data = np.empty(front + padding_row - samples + 3 * num_seqs + 1 + 2 * num_tokens, dtype=np.int32)
        at, read = 0, 0

        def copied(count: int, filled: int, padding: int) -> None:
            nonlocal at, read
            data[at : at + count] = self.data[read : read + count]
            data[at + count : at + filled] = padding
            at, read = at + filled, read + count

        copied(front, front + padding_row - samples, num_seqs - 1)
        copied(n, num_seqs, padding_row)  # rows
        copied(n, num_seqs, 0)  # starts
        copied(n + 1, num_seqs + 1, total)  # bounds
        copied(total, num_tokens, 0)  # tokens
        copied(total, num_tokens, num_seqs - 1)  # owners
        return data


class _Rows(NamedTuple):
    """What the last decode batch was, for the step that is the same."""

    requests: list[Request]
    rows: np.ndarray  # padded to all rows
    sampling: int
    logprobs: int


class Batcher:
    """Host side of the device's rows. Row `max_num_seqs` belongs to nobody: padding goes there."""

    def __init__(self, max_num_seqs: int, max_blocks: int, seed: int) -> None:
        self._max_blocks, self._seed = max_blocks, seed  # blocks: of one row's table
        self._padding = [max_num_seqs] * (max_num_seqs + 1)
        self._free = list(range(max_num_seqs - 1, -1, -1))
        self._row_of: dict[int, int] = {}  # request index -> row
        # By row: its last chunk sampled, so the device knows its next token and position; what its sampling
        # needs.
        self._ready = np.zeros(max_num_seqs, dtype=bool)
        self._sampling = np.zeros(max_num_seqs, dtype=np.int8)
        self._logprobs = np.full(max_num_seqs, NO_LOGPROBS, dtype=np.int32)
        self._last: _Rows | None = None

    def pack(self, plan: StepPlan) -> StepInput:
        """Applies the plan to the rows and returns what the device has to be told."""
        step = self._pack(plan)
        if not plan.copies:
            return step
        copies = np.array(plan.copies, dtype=np.int32).reshape(-1)
        return replace(step, data=np.concatenate((step.data, copies)), num_copies=len(plan.copies))

    def _pack(self, plan: StepPlan) -> StepInput:
        row_of = self._row_of
        for request in plan.left:
            if (row := row_of.pop(request.index, None)) is not None:
                self._free.append(row)
        admissions: list[int] = []
        for request in plan.admitted:
            row = row_of[request.index] = self._free.pop()
            admissions.append(row)
            admissions += self._parameters(request, row)
        updates: list[int] = []
        for request, first, blocks in plan.allocated:
            place = row_of[request.index] * self._max_blocks + first
            updates.extend(range(place, place + len(blocks)))
        for _, _, blocks in plan.allocated:
            updates.extend(blocks)
        num_seqs = len(plan.requests)
        if plan.num_tokens == num_seqs and not admissions and False not in plan.samples:
            last = self._last
            if last is not None and last.requests == plan.requests:
                return self._decode(plan, last, updates, same_rows=True)
            rows = np.array(
                [row_of[r.index] for r in plan.requests] + self._padding[num_seqs:], dtype=np.int32
            )
            own = rows[:num_seqs]
            if self._ready[own].all():
                self._last = _Rows(
                    plan.requests, rows, int(self._sampling[own].max()), int(self._logprobs[own].max())
                )
                return self._decode(plan, self._last, updates, same_rows=False)
        self._last = None
        return self._mixed(plan, admissions, updates)

    def _decode(self, plan: StepPlan, last: _Rows, updates: list[int], *, same_rows: bool) -> StepInput:
        data = np.array(updates, dtype=np.int32)
        if not same_rows:
            data = np.concatenate((data, last.rows))
        n = len(plan.requests)
        return StepInput(
            data=data,
            decode=True,
            same_rows=same_rows,
            num_seqs=n,
            num_tokens=n,
            num_samples=n,
            num_updates=len(updates) // 2,
            num_admitted=0,
            max_query=1,
            max_context=max(plan.starts) + 1,
            sampling=last.sampling,
            logprobs=last.logprobs,
            sampled=None,
        )

    def _mixed(self, plan: StepPlan, admissions: list[int], updates: list[int]) -> StepInput:
        requests, starts, lengths = plan.requests, plan.starts, plan.lengths
        rows = np.array([self._row_of[r.index] for r in requests], dtype=np.int32)
        samples = np.array(plan.samples, dtype=bool)
        self._ready[rows] = samples
        tokens: list[int] = []
        for request, start, length in zip(requests, starts, lengths, strict=True):
            known = request.token_ids
            if length > 1:
                tokens += known[start : start + length]
            else:
                tokens.append(known[start] if start < len(known) else -1)
        counts = np.array(lengths, dtype=np.int32)
        bounds = np.zeros(len(requests) + 1, dtype=np.int32)
        np.cumsum(counts, out=bounds[1:])
        sampled = np.flatnonzero(samples)
        first = np.array(starts, dtype=np.int32)
        small = np.array(updates + admissions, dtype=np.int32)
        parts = (
            small,
            sampled,
            rows,
            first,
            bounds,
            np.array(tokens, dtype=np.int32),
            np.repeat(np.arange(len(requests)), counts),
        )
        drawing = rows[sampled]
        return StepInput(
            data=np.concatenate(parts, dtype=np.int32, casting="same_kind"),
            decode=False,
            same_rows=False,
            num_seqs=len(requests),
            num_tokens=plan.num_tokens,
            num_samples=len(sampled),
            num_updates=len(updates) // 2,
            num_admitted=len(plan.admitted),
            max_query=int(counts.max()),
            max_context=int((first + counts).max()),
            sampling=int(self._sampling[drawing].max(initial=GREEDY)),
            logprobs=int(self._logprobs[drawing].max(initial=NO_LOGPROBS)),
            sampled=None if samples.all() else sampled.tolist(),
        )

    def _parameters(self, request: Request, row: int) -> list[int]:
        sampling = request.sampling
        filtered = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        self._sampling[row] = GREEDY if sampling.temperature == 0 else FILTERED if filtered else RANDOM
        self._logprobs[row] = NO_LOGPROBS if sampling.logprobs is None else sampling.logprobs
        self._ready[row] = False
        numbers = np.array((sampling.temperature, sampling.top_p, sampling.min_p), dtype=np.float32).view(
            np.int32
        )
        key = np.array((request_seed(request, self._seed),), dtype=np.int64).view(np.int32)
        return [*numbers.tolist(), min(max(sampling.top_k, 0), 2**31 - 1), *key.tolist()]


def request_seed(request: Request, seed: int) -> int:
    """The key of a request's chance, int64: its own seed alone, or the run's seed and its id."""
    own = request.sampling.seed
    key = f"own/{own}" if own is not None else f"run/{seed}/{request.id}"
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)
