"""ARC eviction."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from headway import Block, Context, Eviction, Registry, Request, hookimpl, prefix_keys

from .queues import Ghosts, Queue


@dataclass
class AdaptiveReplacement(Eviction):
    """Balances once-used (T1) and reused (T2) blocks by hits on the ghosts of each, B1 and B2 (ARC; Megiddo
    and Modha, FAST'03, figure 4).

    Agrees with libCacheSim's ARC hit for hit on flat streams. The paper looks at the page it missed, adapts
    the target p and then makes room. The core makes room before a block has content, so the misses of a
    prompt are read when its request is admitted, and each eviction takes the next one as its cause; generated
    blocks adapt p when they are published. A list whose blocks are all in use lets the other one pay. On
    chains of prefixes it is leaf-ARC: of a list the first block goes that nothing hangs under. With
    `cache.subtree=true` the first that nobody uses does, and takes its tails along.
    """

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._c, self._size = ctx.num_blocks, ctx.block_size
        self.p = 0.0  # target size of T1, blocks
        self._t1, self._t2, self._b1, self._b2 = Queue(), Queue(), Ghosts(), Ghosts()
        # of the request admitted last: where each missing block was a ghost
        self._misses: deque[Ghosts | None] = deque()
        # keys that were ghosts when they were asked for and are being computed
        self._returning: dict[int, None] = {}
        self._leaves_ghost = True

    def on_admit(self, request: Request, now: float) -> None:
        self._misses.clear()
        for i, key in enumerate(prefix_keys(request.token_ids, self._size, request.cache_salt)):
            if i >= len(request.block_table):
                self._misses.append(self._adapt(key))

    def _adapt(self, key: int) -> Ghosts | None:
        """Cases II and III: a ghost that is asked for moves the target. Answers whose ghost it was."""
        b1, b2 = self._b1, self._b2
        if key in b1:
            self.p = min(self.p + max(len(b2) / len(b1), 1.0), self._c)
            ghosts = b1
        elif key in b2:
            self.p = max(self.p - max(len(b1) / len(b2), 1.0), 0.0)
            ghosts = b2
        else:
            return None
        ghosts.take(key)
        self._returning[key] = None
        return ghosts

    def on_insert(self, block: Block) -> None:
        self._adapt(block.key)
        queue = self._t2 if block.key in self._returning else self._t1
        self._returning.pop(block.key, None)
        queue.join(block, block.created)

    def on_hit(self, block: Block) -> None:
        if block in self._t1:
            self._t1.leave(block)
        self._t2.join(block, block.last_access)

    def on_evictable(self, block: Block) -> None:
        queue = self._t1 if block in self._t1 else self._t2
        queue.join(block, block.last_access)
        queue.ready(block)

    def on_in_use(self, block: Block) -> None:
        (self._t1 if block in self._t1 else self._t2).busy(block)

    def on_evict(self, block: Block) -> None:
        queue, ghosts = (self._t1, self._b1) if block in self._t1 else (self._t2, self._b2)
        queue.leave(block)
        if self._leaves_ghost:
            ghosts.add(block.key)
        self._leaves_ghost = True

    def candidates(self, n: int) -> Iterator[Block]:
        t1, t2 = self._t1, self._t2
        while True:
            miss = self._misses.popleft() if self._misses else None
            if miss is None:
                self._make_room_for_a_ghost()
            above = len(t1) > self.p or (len(t1) == self.p and miss is self._b2)
            first, then = (t1, t2) if (t1 and above) or not t2 or not self._leaves_ghost else (t2, t1)
            block = first.take() or then.take()
            if block is None:
                return
            yield block

    def _make_room_for_a_ghost(self) -> None:
        """Case IV, what is missed was in no list: |T1| + |B1| stays within c, all four within 2c. A T1 that
        alone fills c leaves no ghost."""
        t1, t2, b1, b2 = len(self._t1), len(self._t2), len(self._b1), len(self._b2)
        if t1 + b1 >= self._c:
            self._leaves_ghost = b1 > 0
            self._b1.trim(b1 - 1)
        elif t1 + t2 + b1 + b2 >= 2 * self._c:
            self._b2.trim(b2 - 1)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("eviction", "arc", AdaptiveReplacement)
