"""What fair orders share: a queue for each client that has requests waiting."""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter

from headway import Context, Order, Request

_AGE = attrgetter("sort_key")


class ClientOrder(Order):
    """Keeps `queues`: client -> its waiting requests, oldest first; clients that have none are not in it."""

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self.queues: dict[str, list[Request]] = {}

    def on_arrival(self, request: Request, now: float) -> None:
        insort(self.queues.setdefault(request.tags.client, []), request, key=_AGE)

    def on_preempt(self, request: Request, now: float) -> None:
        insort(self.queues.setdefault(request.tags.client, []), request, key=_AGE)

    def on_admit(self, request: Request, now: float) -> None:
        self._leave(request)

    def on_finish(self, request: Request, now: float) -> None:
        self._leave(request)  # rejected, or its last token came back after a preemption

    def _leave(self, request: Request) -> None:
        queue = self.queues.get(request.tags.client, [])
        at = bisect_left(queue, request.sort_key, key=_AGE)
        if at < len(queue) and queue[at] is request:
            del queue[at]
            if not queue:
                del self.queues[request.tags.client]
                self.left(request.tags.client)

    def left(self, client: str) -> None:
        """`client` has no request waiting any more."""
