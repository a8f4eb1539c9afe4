"""Policies that are a key: a plugin says what to sort by, and the core keeps requests and blocks sorted."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from .blocks import Block
from .context import Context
from .errors import HeadwayError, PolicyError
from .policy import Eviction, Order, Scheduler
from .request import Request

if TYPE_CHECKING:
    from .view import View


def _holds_nan(key: Any) -> bool:
    """Whether a key is NaN or a tuple with one in it: it compares with nothing, and a queue that holds it is
    in no order."""
    return any(map(_holds_nan, key)) if isinstance(key, tuple) else bool(key != key)


class KeyOrder(Order):
    """Smallest `key(request)` first, ties by arrival. The queue is kept sorted here: O(log n) comparisons
    per change, O(w) per step.

    The key is read when a request begins to wait, on arrival and after a preemption; where it changes while
    the request waits, say `rekey(request)`. Keys of one order must compare with each other.
    """

    window: ClassVar[int] = Scheduler.window  # requests offered a step: no scheduler looks at more

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._keys: list[tuple[Any, tuple[float, int]]] = []  # sorted; parallel to _queue
        self._queue: list[Request] = []
        self._key_of: dict[int, tuple[Any, tuple[float, int]]] = {}  # request index -> its entry in _keys

    def key(self, request: Request) -> Any:
        """What to sort by, smallest first."""
        raise NotImplementedError

    def rank(self, request: Request) -> tuple[Any, tuple[float, int]]:
        """Compares any two requests, waiting or running, as this order ranks them now: smaller goes first."""
        try:
            return self.key(request), request.sort_key
        except HeadwayError:
            raise
        except Exception as error:  # a scheduler may ask, and it is not the one that raises
            message = f"key() raised {type(error).__name__}: {error}"
            raise PolicyError(message, plugin=self.plugin_name, request=request.id) from error

    def rank_at(self, now: float) -> Callable[[Request], Any]:
        return self.rank

    def rekey(self, request: Request) -> None:
        """Reads the key of a waiting request again; anything else is left alone."""
        if request.index in self._key_of:
            self._leave(request)
            self._join(request)

    def order(self, view: View) -> Iterable[Request]:
        first = self._queue[: self.window]
        return first if len(first) == len(self._queue) else self._all(first)

    def _all(self, first: list[Request]) -> Iterator[Request]:
        """Beyond the window comes who looks further because admission turned requests away."""
        yield from first
        offered = {request.index for request in first}
        yield from [request for request in self._queue if request.index not in offered]

    def on_arrival(self, request: Request, now: float) -> None:
        self._join(request)

    def on_preempt(self, request: Request, now: float) -> None:
        self._join(request)

    def on_admit(self, request: Request, now: float) -> None:
        self._leave(request)

    def on_finish(self, request: Request, now: float) -> None:
        if request.index in self._key_of:  # rejected, or its last token came back after a preemption
            self._leave(request)

    def _join(self, request: Request) -> None:
        entry = self.rank(request)
        if _holds_nan(entry[0]):
            raise PolicyError(
                f"key() answered {entry[0]!r}, which sorts nowhere",
                plugin=self.plugin_name,
                request=request.id,
            )
        self._key_of[request.index] = entry
        at = bisect_left(self._keys, entry)
        self._keys.insert(at, entry)
        self._queue.insert(at, request)

    def _leave(self, request: Request) -> None:
        at = bisect_left(self._keys, self._key_of.pop(request.index))
        del self._keys[at], self._queue[at]


class MovingOrder(Order):
    """Smallest `key(request, now)` first, ties by arrival: for ranks that move with time, at which no queue
    stays sorted.

    The keys of all waiting requests are read per step, O(n log w).
    """

    window: ClassVar[int] = Scheduler.window

    def key(self, request: Request, now: float) -> Any:
        """What to sort by at this time, smallest first."""
        raise NotImplementedError

    def rank_at(self, now: float) -> Callable[[Request], Any]:
        def rank(request: Request) -> tuple[Any, tuple[float, int]]:
            try:
                key = self.key(request, now)
            except HeadwayError:
                raise
            except Exception as error:  # a scheduler may ask, and it is not the one that raises
                message = f"key() raised {type(error).__name__}: {error}"
                raise PolicyError(message, plugin=self.plugin_name, request=request.id) from error
            if _holds_nan(key):
                raise PolicyError(
                    f"key() answered {key!r}, which sorts nowhere",
                    plugin=self.plugin_name,
                    request=request.id,
                )
            return key, request.sort_key

        return rank

    def order(self, view: View) -> Iterator[Request]:
        rank = self.rank_at(view.now)
        first = heapq.nsmallest(self.window, view.waiting, key=rank)
        yield from first
        if len(first) < len(view.waiting):  # who looks further, because admission turned requests away
            offered = {request.index for request in first}
            yield from sorted((request for request in view.waiting if request.index not in offered), key=rank)


class BlockHeap:
    """Blocks by key, smallest first, ties in the order in which they came. What queue-based evictions are
    made of: a queue holds only its evictable blocks, each at the position it has in the paper's list, so that
    nothing ever walks over blocks in use.

    Entries of blocks that left before their turn are dropped lazily: every operation is O(log n), amortised.
    """

    __slots__ = ("_heap", "_entries", "_serial")

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int, Block]] = []
        self._entries: dict[int, tuple[Any, int, Block]] = {}  # block id -> its valid entry
        self._serial = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, block: Block) -> bool:
        return block.id in self._entries

    def push(self, key: Any, block: Block) -> None:
        """Adds the block, or moves it to another key."""
        self._serial += 1
        entry = self._entries[block.id] = (key, self._serial, block)
        heapq.heappush(self._heap, entry)

    def discard(self, block: Block) -> None:
        """Takes the block out; nothing happens if it is not in."""
        if self._entries.pop(block.id, None) is not None and len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)

    def peek(self) -> tuple[Any, Block] | None:
        """The smallest key and its block, None if there is none."""
        heap, entries = self._heap, self._entries
        while heap:
            key, _, block = heap[0]
            if entries.get(block.id) is heap[0]:
                return key, block
            heapq.heappop(heap)
        return None

    def pop(self) -> Block | None:
        """Takes out the block with the smallest key, None if there is none."""
        heap, entries = self._heap, self._entries
        while heap:
            entry = heapq.heappop(heap)
            block = entry[2]
            if entries.get(block.id) is entry:
                del entries[block.id]
                return block
        return None


class KeyEviction(Eviction):
    """Evicts the smallest `key(block)`. The heap is kept here: O(log n) per eviction.

    The key is read when a block becomes evictable; a block that is hit leaves and comes back with a new key.
    """

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._heap = BlockHeap()

    def key(self, block: Block) -> Any:
        """What to sort by, smallest goes first."""
        raise NotImplementedError

    def on_evictable(self, block: Block) -> None:
        key = self.key(block)
        if _holds_nan(key):
            raise PolicyError(
                f"key() answered {key!r} for {block}, which sorts nowhere", plugin=self.plugin_name
            )
        self._heap.push(key, block)

    def on_in_use(self, block: Block) -> None:
        self._heap.discard(block)

    def candidates(self, n: int) -> Iterator[Block]:
        while (block := self._heap.pop()) is not None:
            yield block
