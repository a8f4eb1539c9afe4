"""Roster: which requests wait and run, and every way from one to the other. It alone writes a request.

    arrive -> waiting -- admit --> running -- finish --> ended
                 ^                   |  |
                 |  preempt, pause   |  schedule, commit: once per step that plans it
                 '-------------------'
    waiting -- reject, abort --> ended          running -- abort --> ended: between two steps

Who leaves `running` while steps that contain it are in flight is also `releasing`: its blocks are given back
when the last of these steps has come back. Who pauses leaves like one that is preempted, and is also in
`paused`: it keeps its blocks until it is admitted again, or until memory runs short (`take_paused`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from . import spans
from .arrivals import ArrivalQueue
from .blocks import ROOT, BlockPool, KVLayout
from .calls import Calls
from .execution import Tokens
from .handoff import Handoff
from .matching import Matches
from .outputs import RequestOutput, StopText
from .paused import Paused
from .pins import Pins
from .plan import StepPlan
from .policy import Retention
from .request import Request, RequestList, RequestState

_RUNNING, _WAITING = RequestState.RUNNING, RequestState.WAITING
_PREEMPTED, _PAUSED = RequestState.PREEMPTED, RequestState.PAUSED


class Committed(NamedTuple):
    """What a completed step came to."""

    tokens: Tokens  # that reached requests: nothing of a request that had ended, nothing behind its end
    emitted: int
    ended: list[tuple[Request, str]]  # with the reason; still to be finished


class Roster:
    """The requests of an engine, by state. Tells the roles, and the closed loop when a request has ended."""

    def __init__(
        self,
        pool: BlockPool,
        matches: Matches,
        calls: Calls,
        arrivals: ArrivalQueue,
        *,
        max_num_seqs: int,
        most_preemptions: int,
        placeholders: bool = True,
        retention: Retention | None = None,
        stop_text: StopText | None = None,
    ) -> None:
        self._pool, self._matches, self._calls, self._arrivals = pool, matches, calls, arrivals
        self._retention, self._stop_text = retention, stop_text
        self.max_num_seqs, self.placeholders = max_num_seqs, placeholders
        self._most_preemptions = most_preemptions
        self._block_size = pool.layout.block_size  # KVLayout's formulas are inlined where they are hot
        self.waiting, self.running = RequestList(), RequestList()
        self.releasing: dict[int, Request] = {}  # by index: left `running`, with blocks in steps in flight
        self.kept_heads: dict[int, int] = {}  # index -> head blocks that a drop_tail preemption keeps
        self.reserved_blocks: dict[int, int] = {}  # index of who runs -> blocks that come back for it
        self.hidden_ends: dict[int, int] = {}  # index -> known tokens at which an emulated answer ends
        self.present: dict[str, Request] = {}  # by id: arrived and not ended
        self.pins, self.paused = Pins(pool), Paused(pool)
        self.finished: list[RequestOutput] = []  # of the run, in the order of ending
        self.num_preemptions = self.num_pauses = 0  # of the run
        self.preemptions_since_token = 0
        self.begin_step()
        self._left: list[Request] = []
        self._preempted: list[Request] = []
        self._rejected: list[Request] = []
        self._ended: list[Request] = []

    # ---- the lists as policies see them -------------------------------------------------------------------

    def begin_step(self) -> None:
        """From now on `running_at_start` and `waiting_at_start` are the lists as they are now."""
        self.running_at_start, self.waiting_at_start = self.running.frozen(), self.waiting.frozen()

    @property
    def decides_stop_strings(self) -> bool:
        return self._stop_text is not None

    # ---- transitions --------------------------------------------------------------------------------------

    @property
    def layout(self) -> KVLayout:
        return self._pool.layout

    def arrive(self, request: Request, now: float, output_len: int | None = None) -> None:
        """It waits from now on. Its emulated answer ends after `output_len` tokens, if that is given."""
        if output_len is not None:
            self.hidden_ends[request.index] = request.num_prompt_tokens + output_len
        self.present[request.id] = request
        self.waiting.add(request)
        self._calls.notify("on_arrival", request, now)

    def admit(self, request: Request, matched: Sequence[int], cached: int, now: float) -> None:
        """waiting -> running, on the `matched` cached blocks that hold its first `cached` tokens."""
        first = request.state is _WAITING
        if not request.block_table:
            self._take(request, matched)
        if request.state is _PAUSED:  # it goes on where it was
            self.paused.remove(request)
        else:
            request.planned_from = cached
        request.num_admissions += 1
        if first:
            request.num_cached_tokens = cached
            request.first_scheduled_time = now
        self._matches.forget(request)
        self.waiting.remove(request)
        self.running.add(request)
        request.state = _RUNNING
        self._calls.notify("on_admit", request, now)

    def schedule_decodes(
        self, requests: Iterable[Request], step: int, most: int, planned: list[Request], starts: list[int]
    ) -> Request | None:
        """Plans the next token of running requests that have room for it in their last block, the common
        case: appends them to `planned` and its position to `starts`.

        Returns the first request that is not that simple, or after `most` the next one, with nothing done;
        None if there is none.
        """
        size, placeholders, end = self._block_size, self.placeholders, len(planned) + most
        for request in requests:
            known, scheduled = request.num_tokens, request.num_scheduled_tokens
            start = request.num_computed_tokens + scheduled
            if (
                known - start != 1
                or request.state is not _RUNNING
                or request.planned_step == step
                or known >= request.max_num_tokens
                or start >= len(request.block_table) * size
                or (scheduled and (request.waits_for_token or not placeholders))
                or len(planned) >= end
            ):
                return request
            request.planned_step = step
            request.num_scheduled_tokens = scheduled + 1
            request.num_tokens = known + 1
            request.num_steps_in_flight += 1
            planned.append(request)
            starts.append(start)
        return None

    def schedule(
        self, request: Request, step: int, start: int, n: int, blocks: Sequence[int], drafts: int = 0
    ) -> bool:
        """Plans `n` tokens from `start` on, the last `drafts` of them guesses, in a table with `blocks` more.
        Returns whether one is sampled."""
        if blocks:
            request.block_table.extend(blocks)
            self.reserved_blocks.pop(request.index, None)
        if request.planned_before:
            request.num_recomputed_tokens += spans.overlap(request.planned_before, start, start + n)
        sample = start + n - drafts == request.num_tokens
        request.planned_step = step
        request.num_scheduled_tokens += n
        request.num_steps_in_flight += 1
        if sample:
            request.num_tokens += 1  # a placeholder until the step comes back
        return sample

    def preempt(self, request: Request, step: int, keep: int, now: float) -> None:
        """running -> waiting, with its generated tokens and the first `keep` of its blocks."""
        self._set_aside(request, step, _PREEMPTED)
        self._count_preemption(request)
        if keep:
            self.kept_heads[request.index] = keep
        self._calls.notify("on_preempt", request, now)
        self._give_back(request)

    def pause(self, request: Request, step: int, now: float) -> None:
        """running -> waiting, with all its blocks."""
        self._set_aside(request, step, _PAUSED)
        self.paused.add(request)
        self.num_pauses += 1
        self._calls.notify("on_preempt", request, now)

    def take_paused(self, request: Request, step: int) -> None:
        """Memory has run short: a paused request is a preempted one from now on. It waits as before."""
        self.paused.remove(request)
        request.planned_step, request.state = step, _PREEMPTED
        self._count_preemption(request)
        self._give_back(request)

    def _set_aside(self, request: Request, step: int, state: RequestState) -> None:
        request.planned_step, request.state = step, state
        self.reserved_blocks.pop(request.index, None)
        self.preemptions_since_token += 1
        self.running.remove(request)
        self.waiting.add(request)
        self._left.append(request)

    def _count_preemption(self, request: Request) -> None:
        planned = request.num_computed_tokens + request.num_scheduled_tokens
        planned = min(planned, request.num_tokens - 1)  # no drafts
        request.planned_before = spans.union(request.planned_before, request.planned_from, planned)
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._preempted.append(request)

    def commit(
        self, plan: StepPlan, tokens: Tokens, now: float, logprobs: Sequence[Sequence[Any]] | None = None
    ) -> Committed:
        """A step has come back: counts, tokens and full blocks of everyone in it. The host's hot loop."""
        size, publishing = self._block_size, self._pool.cache.enabled
        hidden_ends, stop_text = self.hidden_ends, self._stop_text
        more = {plan.requests[place].index: iter(rest) for place, rest in tokens.more.items()}
        ended: list[tuple[Request, str]] = []
        late: set[int] = set()  # index of requests that ended while this step was in flight
        lengths = _without_wrong_drafts(plan, tokens) if plan.drafts else plan.lengths
        chunks = (plan.requests, plan.starts, lengths, tokens.first)
        for request, start, length, token in zip(*chunks, strict=True):
            request.num_scheduled_tokens -= length
            request.num_steps_in_flight -= 1
            computed = start + length
            if request.state is _RUNNING or request.state is _PAUSED:
                request.num_computed_tokens = computed
            else:
                if not request.num_steps_in_flight and request.index in self.releasing:
                    del self.releasing[request.index]
                    self._release(request, self.kept_heads.pop(request.index, 0))
                if request.state is not _PREEMPTED:
                    late.add(request.index)
                    continue
                computed = 0  # its blocks were given back
            while token >= 0:
                known = request.token_ids
                known.append(token)
                request.token_times.append(now)
                count = len(known)
                if token in request.stop_tokens:
                    request.stop_reason = token
                    ended.append((request, "stop"))
                elif stop_text and request.sampling.stop and (stop := stop_text(request)) is not None:
                    request.stop_text, request.stop_reason = stop
                    ended.append((request, "stop"))
                elif hidden_ends and count >= hidden_ends.get(request.index, count + 1):
                    ended.append((request, "stop"))
                elif count >= request.max_num_tokens:
                    ended.append((request, "length"))
                elif more and request.index in more:
                    token = next(more[request.index], -1)
                    continue
                break
            if publishing and computed // size > request.num_published_blocks:
                publish(self._pool, request, min(computed, len(request.token_ids)) // size)
        emitted = plan.samples.count(True)
        if late or more:
            tokens = _kept(plan, tokens, late, more)
            emitted = sum(map(len, tokens))
        if logprobs is not None:
            for request, new, alternatives in zip(plan.requests, tokens, logprobs, strict=True):
                request.logprobs += alternatives[: len(new)]
        if emitted:
            self.preemptions_since_token = 0
        return Committed(tokens, emitted, ended)

    def finish(self, request: Request, reason: str, now: float) -> None:
        """Its last token has come back; it runs, or was preempted meanwhile."""
        self._leave(request)
        self._end(request, RequestState.FINISHED, reason, now)
        if self._retention is not None and self._holds_its_content(request):
            self._calls.call(self._retention, self._retention.retain, request, self.pins, now)
        self._give_all_back(request)
        self._tell_end(request, now)
        self._arrivals.follow(request, now)

    def abort(self, request: Request, now: float) -> None:
        """Ends it wherever it is, between two steps. Tokens of steps in flight are dropped, and nothing
        follows."""
        self._leave(request)
        self._end(request, RequestState.ABORTED, "abort", now)
        self._give_all_back(request)
        self._tell_end(request, now)

    def detach(self, request: Request, now: float) -> None:
        """It goes on in another engine; none of its steps is in flight. What is cached of it stays."""
        self._leave(request)
        request.state = RequestState.DETACHED
        del self.present[request.id]
        self._give_all_back(request)
        self._tell_end(request, now)

    def attach(self, request: Request, had: Handoff, now: float) -> tuple[int, list[int]]:
        """A new request goes on with what it `had` in another engine. Returns the blocks whose KV has to be
        filled with what arrived, and the place of the first in its table."""
        request.token_ids, request.num_tokens = list(had.token_ids), len(had.token_ids)
        request.token_times, request.logprobs = list(had.token_times), list(had.logprobs)
        request.first_scheduled_time = had.first_scheduled_time
        request.num_cached_tokens, request.num_preemptions = had.num_cached_tokens, had.num_preemptions
        request.num_recomputed_tokens = had.num_recomputed_tokens
        request.state = _WAITING if had.first_scheduled_time < 0 else _PREEMPTED
        pool, blocks, matched = self._pool, [], self._matches.match(request).blocks
        self._take(request, matched)
        if (missing := min(had.num_blocks - len(matched), pool.num_available - self.num_reserved_blocks)) > 0:
            blocks = pool.allocate(missing)
            request.block_table.extend(blocks)
            request.num_computed_tokens = pool.layout.num_tokens(len(request.block_table))
            if pool.cache.enabled:
                publish(pool, request, len(request.block_table))
        self.arrive(request, now, had.arrival.output_len)
        return len(matched), blocks

    def reject(self, request: Request, reason: str, now: float) -> None:
        """waiting -> ended, by a policy."""
        self._rejected.append(request)
        self.waiting.remove(request)
        self._end(request, RequestState.REJECTED, reason, now)
        self._tell_end(request, now)
        self._arrivals.follow(request, now)

    def refuse(self, request: Request, reason: str, now: float) -> None:
        """A request that can never run: it ends before any policy hears of it."""
        self._end(request, RequestState.REJECTED, reason, now)
        self._arrivals.follow(request, now)

    def abort_all(self, reason: str, now: float) -> bool:
        """Ends who is left of a run that is cut off; `clear` must follow. Returns whether there was
        anybody."""
        cut_off = [*self.running.items, *self.waiting.items]
        for request in cut_off:
            self._end(request, RequestState.ABORTED, reason, now)
        return bool(cut_off)

    def clear(self) -> None:
        """Forgets everyone, with every block: nothing is in flight any more."""
        self._left += self.running.items
        for held in (self.running, self.waiting, self.kept_heads, self.reserved_blocks, self.releasing):
            held.clear()
        self.hidden_ends.clear()
        self.preemptions_since_token = 0
        self._preempted.clear()
        self.paused.clear()
        self.pins.clear()
        self._pool.clear()
        self._matches.clear()
        self.begin_step()

    def begin_run(self) -> None:
        """Outputs and counts are those of one run."""
        self.finished = []
        self.num_preemptions = self.num_pauses = 0

    def _leave(self, request: Request) -> None:
        """Takes it off the list that it is on."""
        if request.state is _RUNNING:
            self.running.remove(request)
            self._left.append(request)
        else:
            self.waiting.remove(request)
            if request.state is _PAUSED:
                self.paused.remove(request)

    def _end(self, request: Request, state: RequestState, reason: str, now: float) -> None:
        request.state, request.finish_reason, request.finish_time = state, reason, now
        request.num_tokens = len(request.token_ids)
        if self.present.get(request.id) is request:
            del self.present[request.id]
        self._matches.forget(request)
        self.finished.append(RequestOutput.of(request))
        self._ended.append(request)

    def _tell_end(self, request: Request, now: float) -> None:
        self._calls.notify("on_finish", request, now)
        self.hidden_ends.pop(request.index, None)

    # ---- what others take out of it -----------------------------------------------------------------------

    def take_left(self) -> list[Request]:
        """Who stopped running since the last launched plan: their rows on the device are free."""
        left, self._left = self._left, []
        return left

    def put_back_left(self, left: list[Request]) -> None:
        """After a launch that failed: the executor may not have heard of them."""
        self._left = left + self._left

    def take_preempted(self) -> list[Request]:
        """Who was preempted since the last call, those included who were paused before."""
        preempted, self._preempted = self._preempted, []
        return preempted

    def take_rejected(self) -> list[Request]:
        """Who was rejected by a policy since the last call."""
        rejected, self._rejected = self._rejected, []
        return rejected

    def take_ended(self) -> list[Request]:
        """Who ended in any way since the last call."""
        ended, self._ended = self._ended, []
        return ended

    # ---- blocks -------------------------------------------------------------------------------------------

    @property
    def thrashing(self) -> bool:
        """Requests preempt each other before any of them emits a token: a livelock unless somebody is
        protected."""
        return self.preemptions_since_token > self._most_preemptions

    @property
    def num_reserved_blocks(self) -> int:
        return sum(self.reserved_blocks.values())

    @property
    def num_releasing_blocks(self) -> int:
        """Blocks that come free when the steps in flight have come back."""
        blocks, kept = self._pool.blocks, self.kept_heads
        tables = (r.block_table[kept.get(r.index, 0) :] for r in self.releasing.values())
        return sum(1 for table in tables for block in table if blocks[block].ref_count == 1)

    def reserve(self, request: Request, num_blocks: int) -> None:
        """Keeps this many of the blocks that come back for a running request, from those that want to
        start."""
        self.reserved_blocks[request.index] = num_blocks

    def reclaim(self, needy: Request | None = None) -> bool:
        """The last resort before a request preempts itself: the newest head kept by one that waits, then a
        pin."""
        for request in reversed(self.waiting.items):
            if request.block_table and request is not needy and not request.num_steps_in_flight:
                if request.state is _PAUSED:
                    self.take_paused(request, -1)
                else:
                    self._release(request)
                return True
        return self.pins.give_up_soonest()

    @property
    def holds_blocks_for_later(self) -> bool:
        return bool(self.pins) or any(request.block_table for request in self.waiting.items)

    def _take(self, request: Request, cached: Sequence[int], *, hit: bool = True) -> None:
        """Its table begins with these blocks of the prefix cache."""
        self._pool.acquire(cached, request.tags, hit=hit)
        request.block_table = list(cached)
        request.num_published_blocks = len(cached)
        request.published_parent = cached[-1] if cached else ROOT
        request.num_computed_tokens = self._pool.layout.num_tokens(len(cached))

    def _holds_its_content(self, request: Request) -> bool:
        """Whether there is anything to retain. A request whose last token came back after a preemption takes
        what is left of it in the cache, so that its end is like any other."""
        if not request.block_table and self._pool.cache.enabled:
            self._take(request, self._matches.content(request), hit=False)
        return bool(request.block_table)

    def _give_back(self, request: Request) -> None:
        """Releases blocks now, or when the last step in flight that uses them has come back."""
        if request.num_steps_in_flight:
            self.releasing[request.index] = request
        else:
            self._release(request, self.kept_heads.pop(request.index, 0))

    def _give_all_back(self, request: Request) -> None:
        """Of a request that has ended: a head that it kept, too."""
        self.kept_heads.pop(request.index, None)
        self.reserved_blocks.pop(request.index, None)
        self._give_back(request)

    def _release(self, request: Request, keep: int = 0) -> None:
        """Gives the blocks after the first `keep` back."""
        pool, table, twins = self._pool, request.block_table, request.canonical_blocks
        keep = min(keep, pool.layout.num_full_blocks(request.num_computed_tokens))
        pool.release([twins.pop(i) for i in sorted(twins) if i >= keep], request.tags)
        pool.release(table[keep:], request.tags)
        request.block_table = table[:keep]
        request.num_computed_tokens = pool.layout.num_tokens(keep)
        if request.num_published_blocks > keep:
            request.num_published_blocks = keep
            request.published_parent = twins.get(keep - 1, table[keep - 1]) if keep else ROOT
        self._matches.forget(request)
        if self.pins.take_dropped(request) and pool.cache.enabled:
            pool.drop(self._matches.content(request))


def _without_wrong_drafts(plan: StepPlan, tokens: Tokens) -> list[int]:
    """The chunks' lengths without what was drafted wrongly, whose KV is computed again."""
    lengths = list(plan.lengths)
    for place, drafts in plan.drafts.items():
        wrong = max(0, len(drafts) - len(tokens.more.get(place, ())))
        lengths[place] -= wrong
        plan.requests[place].num_scheduled_tokens -= wrong
    return lengths


def _kept(plan: StepPlan, tokens: Tokens, late: set[int], more: dict[int, Iterator[int]]) -> Tokens:
    """What reached requests: not what came for those that are `late`, nor what is left of `more`, behind an
    end. A request that was given several has them in place of its placeholder."""
    first, rest = list(tokens.first), {}
    for place, request in enumerate(plan.requests):
        if request.index in late:
            first[place] = -1
        elif request.index in more:
            dropped = sum(1 for _ in more[request.index])
            rest[place] = tokens.more[place][: len(tokens.more[place]) - dropped]
            request.num_tokens = len(request.token_ids)
    return Tokens(first, rest)


def publish(pool: BlockPool, request: Request, upto: int) -> None:
    """Offers the request's full, computed blocks before index `upto` to the prefix cache, after the step that
    wrote them."""
    size, table, parent = pool.block_size, request.block_table, request.published_parent
    for index in range(request.num_published_blocks, upto):
        tokens = tuple(request.token_ids[index * size : (index + 1) * size])
        canonical = pool.publish(request, parent, tokens, table[index])
        if canonical != table[index]:
            request.canonical_blocks[index] = canonical
        request.published_parent = parent = canonical
        request.num_published_blocks = index + 1
