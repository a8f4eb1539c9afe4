"""Policies that break a rule each. The conformance kit must reject every one; see test_conformance.py."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from headway import (
    ROOT,
    Admission,
    Block,
    ChunkSize,
    Defer,
    Eviction,
    Need,
    Order,
    PrefixCache,
    Request,
    Scheduler,
    Victim,
    hookimpl,
)

# ---- schedulers -------------------------------------------------------------------------------------------


@dataclass
class StaleView(Scheduler):
    """Plans whom it saw running a step ago."""

    def setup(self, ctx):
        super().setup(ctx)
        self._seen: tuple[Request, ...] = ()

    def plan(self, step, view):
        for request in self._seen:
            step.add(request)
        for request in view.running:
            if request not in step:
                step.add(request)
        for request in self.order(view):
            step.add(request)
        self._seen = view.running


@dataclass
class OverAllocates(Scheduler):
    """Counts free blocks itself, once a step, and takes it for granted that what it counted is granted."""

    def plan(self, step, view):
        free = view.kv.free + view.kv.evictable
        for request in view.running:
            step.add(request)
        for request in self.order(view):
            if free <= 0 or not step.tokens_left:
                break
            free -= view.num_blocks_for(step.add(request).n)


@dataclass
class PlansThePreempted(Scheduler):
    """Preempts the newest and plans it all the same."""

    def plan(self, step, view):
        if len(view.running) > 1:
            step.preempt(view.running[-1])
        for request in view.running:
            step.add(request)
        for request in self.order(view):
            step.add(request)


@dataclass
class Idles(Scheduler):
    """Waits for a full batch that may never come."""

    def plan(self, step, view):
        if view.num_running + view.num_waiting >= 3:
            for request in (*view.running, *self.order(view)):
                step.add(request)


@dataclass
class Sleeps(Scheduler):
    """Always in a moment."""

    def plan(self, step, view):
        step.wake_at(view.now + 0.001)


@dataclass
class PreemptsForEver(Scheduler):
    """Everybody in turn, before a token comes out."""

    def plan(self, step, view):
        for request in view.running:
            step.preempt(request)
        if not view.running:
            for request in self.order(view):
                step.add(request, 1)


@dataclass
class HelpsItself(Scheduler):
    """Raises its own token budget."""

    def plan(self, step, view):
        step.tokens_left += 8
        for request in (*view.running, *self.order(view)):
            step.add(request)


@dataclass
class KnowsItsExecutor(Scheduler):
    """Decides otherwise when it is replayed."""

    def plan(self, step, view):
        backwards = type(view._roles.executor).__name__ == "Replay"
        for request in view.running:
            step.add(request)
        waiting = list(self.order(view))
        for request in reversed(waiting) if backwards else waiting:
            step.add(request)


# ---- orders ----------------------------------------------------------------------------------------------


@dataclass
class ReadsAClock(Order):
    """Ranks by what the wall clock says."""

    def order(self, view):
        return sorted(view.waiting, key=lambda r: int(time.perf_counter() * 1000 + r.index * 37) % 11)


@dataclass
class IteratesASet(Order):
    """Puts ids into a set on the way."""

    def order(self, view):
        by_id = {r.id: r for r in view.waiting}
        return [by_id[id] for id in set(by_id)]


@dataclass
class SaltedHash(Order):
    """Breaks ties by hash() of a string."""

    def order(self, view):
        return sorted(view.waiting, key=lambda r: hash(r.id) % 1000)


@dataclass
class GlobalRandom(Order):
    """Uses the generator that everybody shares."""

    def order(self, view):
        return sorted(view.waiting, key=lambda r: random.random())


@dataclass
class SystemRandom(Order):
    """Asks the operating system for chance."""

    def order(self, view):
        source = random.SystemRandom()
        return sorted(view.waiting, key=lambda r: source.random())


@dataclass
class StarvesAClient(Order):
    """Client "a" first, and always."""

    def order(self, view):
        return sorted(view.waiting, key=lambda r: (r.tags.client != "a", r.sort_key))


@dataclass
class NewestFirst(Order):
    """Last come, first served."""

    def order(self, view):
        return reversed(view.waiting)


@dataclass
class Mutates(Order):
    """Moves a request forward by editing its arrival."""

    def order(self, view):
        for request in view.waiting:
            request.arrival_time -= 0.001 * request.num_prompt_tokens
        return sorted(view.waiting, key=lambda r: r.arrival_time)


@dataclass
class ReadsTheTrueLength(Order):
    """Shortest answer first, from a field that no deployed policy has."""

    def order(self, view):
        return sorted(
            view.waiting, key=lambda r: view._roster.hidden_ends.get(r.index, 1 << 60) - r.num_prompt_tokens
        )


@dataclass
class ReadsTheFuture(Order):
    """Holds short prompts back when more arrivals lie ahead."""

    def order(self, view):
        arrivals = view._roster._arrivals
        arrivals._read_ahead()
        return sorted(view.waiting, key=lambda r: r.num_prompt_tokens, reverse=bool(arrivals))


@dataclass
class RaisesInTheMiddle(Order):
    """Divides by the number of running requests."""

    def order(self, view):
        for request in view.waiting:
            yield request
            1 / (len(request.token_ids) % 7)


@dataclass
class Twice(Order):
    """Names a request twice."""

    def order(self, view):
        return [*view.waiting, *view.waiting]


@dataclass
class ForgetsThePreempted(Order):
    """Keeps a queue of arrivals, and nothing comes back into it."""

    def order(self, view):
        return [r for r in view.waiting if not r.num_preemptions]


@dataclass
class Slow(Order):
    """Compares everything with everything, a few times."""

    def order(self, view):
        total = 0
        for _ in range(6):
            for r in view.waiting:
                for s in (*view.running, *view.waiting):
                    total += r.sort_key < s.sort_key
        return sorted(view.waiting, key=lambda r: (total, r.sort_key))


# ---- victims, chunks, admission --------------------------------------------------------------------------


@dataclass
class NamesTheEnded(Victim):
    """Remembers whom it saw first, also when they are gone."""

    def setup(self, ctx):
        super().setup(ctx)
        self._seen: list[Request] = []

    def on_admit(self, request, now):
        self._seen.append(request)

    def victims(self, need: Need, view) -> Iterable[Request]:
        return self._seen


@dataclass
class TooGenerous(ChunkSize):
    """Answers more than was left."""

    def tokens(self, request, left, view):
        return left + 1


@dataclass
class NeverLetsIn(Admission):
    """Defers without saying until when."""

    def admit(self, request, view):
        return Defer()


# ---- evictions and caches --------------------------------------------------------------------------------


@dataclass
class ParentFirst(Eviction):
    """Evicts the block that was cached first, whatever hangs under it."""

    def setup(self, ctx):
        super().setup(ctx)
        self._blocks: list[Block] = []

    def on_insert(self, block):
        self._blocks.append(block)

    def candidates(self, n) -> Iterator[Block]:
        while self._blocks:
            yield self._blocks.pop(0)


@dataclass
class YieldsNothing(Eviction):
    """Only offers blocks that were hit."""

    def setup(self, ctx):
        super().setup(ctx)
        self._blocks: dict[int, Block] = {}

    def on_evictable(self, block):
        if block.hits:
            self._blocks[block.id] = block

    def on_in_use(self, block):
        self._blocks.pop(block.id, None)

    def candidates(self, n) -> Iterator[Block]:
        while self._blocks:
            yield self._blocks.pop(next(iter(self._blocks)))


@dataclass
class EvictsTheUsed(Eviction):
    """Never hears that a block is in use again."""

    def setup(self, ctx):
        super().setup(ctx)
        self._blocks: list[Block] = []

    def on_evictable(self, block):
        self._blocks.append(block)

    def candidates(self, n) -> Iterator[Block]:
        while self._blocks:
            yield self._blocks.pop(0)


@dataclass
class WritesBlocks(Eviction):
    """Resets the hits it has counted."""

    def setup(self, ctx):
        super().setup(ctx)
        self._blocks: dict[int, Block] = {}

    def on_evictable(self, block):
        block.hits = 0
        self._blocks[block.id] = block

    def on_in_use(self, block):
        del self._blocks[block.id]

    def candidates(self, n) -> Iterator[Block]:
        while self._blocks:
            yield self._blocks.pop(next(iter(self._blocks)))


@dataclass
class TrustsItsHash(PrefixCache):
    """Blocks with the same sum are the same."""

    def setup(self, ctx):
        super().setup(ctx)
        self._size = ctx.block_size
        self._index: dict[tuple[int, int, str], int] = {}
        self._key: dict[int, tuple[int, int, str]] = {}

    def match(self, request, known, limit):
        found, parent = [], known[-1] if known else ROOT
        for i in range(len(known), limit):
            parent = self._index.get(
                (parent, sum(request.token_ids[i * self._size : (i + 1) * self._size]), request.cache_salt)
            )
            if parent is None:
                break
            found.append(parent)
        return found

    def insert(self, request, parent, tokens, block):
        key = (parent, sum(tokens), request.cache_salt)
        self._key.setdefault(block, key)
        return self._index.setdefault(key, block)

    def remove(self, block):
        del self._index[self._key.pop(block)]


@dataclass
class IgnoresTheParent(PrefixCache):
    """A block is known by its own tokens, wherever they stand."""

    def setup(self, ctx):
        super().setup(ctx)
        self._size = ctx.block_size
        self._index: dict[tuple[int, ...], int] = {}
        self._tokens: dict[int, tuple[int, ...]] = {}

    def match(self, request, known, limit):
        found = []
        for i in range(len(known), limit):
            block = self._index.get(tuple(request.token_ids[i * self._size : (i + 1) * self._size]))
            if block is None:
                break
            found.append(block)
        return found

    def insert(self, request, parent, tokens, block):
        self._tokens[block] = tokens
        self._index[tokens] = block
        return block

    def remove(self, block):
        if self._index.get(tokens := self._tokens.pop(block)) == block:
            del self._index[tokens]


#: (role, policy) -> the check that must reject it. The name on the command line is the class's in lower case.
BAD: dict[type, str] = {
    StaleView: "invariants",
    OverAllocates: "exceptions",
    PlansThePreempted: "invariants",
    Idles: "progress",
    Sleeps: "progress",
    PreemptsForEver: "progress",
    HelpsItself: "read-only",
    KnowsItsExecutor: "sim = replay",
    ReadsAClock: "same with another clock",
    IteratesASet: "same with another hash seed",
    SaltedHash: "same with another hash seed",
    GlobalRandom: "same with another global random",
    SystemRandom: "same with another process",
    StarvesAClient: "starvation",
    NewestFirst: "starvation",
    Mutates: "read-only",
    ReadsTheTrueLength: "truth boundary",
    ReadsTheFuture: "truth boundary",
    RaisesInTheMiddle: "exceptions",
    Twice: "invariants",
    ForgetsThePreempted: "progress",
    Slow: "cost",
    NamesTheEnded: "invariants",
    TooGenerous: "invariants",
    NeverLetsIn: "progress",
    ParentFirst: "invariants",
    YieldsNothing: "invariants",
    EvictsTheUsed: "invariants",
    WritesBlocks: "read-only",
    TrustsItsHash: "kv oracle",
    IgnoresTheParent: "kv oracle",
}


@hookimpl
def headway_register(registry):
    for policy in BAD:
        registry.add(policy.role, policy.__name__.lower(), policy)
