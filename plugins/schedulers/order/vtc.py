"""Virtual token counter."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from headway import ConfigError, Context, Registry, Request, StepRecord, View, hookimpl, param

from .clients import ClientOrder


@dataclass
class VirtualTokenCounter(ClientOrder):
    """VTC (Sheng et al., OSDI'24, Algorithm 2; weighted clients of section 4.3): the client with the least
    service goes first.

    wp, wq: service of a prompt token, charged when its request is admitted, and of a generated token, charged
    when it comes. weights: client -> share, 1 where it is not named; a client's charges are divided by it.

    A client that comes back after a pause is lifted to the least counter among those that wait, so it cannot
    save up service. The service of two backlogged clients differs by at most 2 max(wp * longest prompt, wq *
    KV tokens of the pool). Differs: the authors' code never preempts, since it admits by the peak of memory
    (policy=vtc has it); here a preempted request waits again in its client's queue and is not charged a
    second time.
    """

    wp: float = param(1.0, min=0, max=1e6)
    wq: float = param(2.0, min=0, max=1e6)
    weights: dict[str, float] = param({}, min=1e-6, max=1e6)

    def __post_init__(self) -> None:
        if self.wp == self.wq == 0:
            raise ConfigError("order.wp=0, order.wq=0: expected one of them above 0, or nobody is charged")

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self.counters: dict[str, float] = {}
        # counters only grow, so a stale entry is a lower bound and is renewed at the top
        self._heap: list[tuple[float, str]] = []
        self._listed: set[str] = set()  # clients that have an entry in _heap, or that are aside
        self._aside: list[str] = []  # clients that are passed over in this step
        self._last = ""  # the client that was last to leave the queue

    def order(self, view: View) -> Iterator[Request]:
        self._relist()
        while (client := self._least()) is not None:
            request = self.queues[client][0]
            yield request
            # If it was admitted, it has been charged and another client may be first now. If not, its client
            # waits for the next step.
            if self.queues.get(client, [None])[0] is request and self._least() == client:
                heapq.heappop(self._heap)
                self._aside.append(client)

    def on_arrival(self, request: Request, now: float) -> None:
        client = request.tags.client
        if client not in self.queues:
            self._relist()
            least = self._least() if self.queues else self._last
            self.counters[client] = max(
                self.counters.get(client, 0.0), self.counters.get(least, 0.0) if least is not None else 0.0
            )
        super().on_arrival(request, now)
        self._list(client)

    def on_preempt(self, request: Request, now: float) -> None:
        super().on_preempt(request, now)
        self._list(request.tags.client)

    def on_admit(self, request: Request, now: float) -> None:
        super().on_admit(request, now)
        if request.num_admissions == 1:
            self._charge(request, self.wp * request.num_prompt_tokens)

    def on_step_end(self, record: StepRecord) -> None:
        for request, new in zip(record.plan.requests, record.tokens, strict=True):
            for _ in new:
                self._charge(request, self.wq)

    def left(self, client: str) -> None:
        self._last = client

    def _charge(self, request: Request, service: float) -> None:
        client = request.tags.client
        self.counters[client] += service / self.weights.get(client, 1.0) if self.weights else service

    def _list(self, client: str) -> None:
        if client not in self._listed:
            self._listed.add(client)
            heapq.heappush(self._heap, (self.counters[client], client))

    def _relist(self) -> None:
        for client in self._aside:
            heapq.heappush(self._heap, (self.counters[client], client))
        self._aside.clear()

    def _least(self) -> str | None:
        """The waiting client with the smallest counter, ties by name."""
        heap = self._heap
        while heap:
            counter, client = heap[0]
            if client not in self.queues:
                heapq.heappop(heap)
                self._listed.discard(client)
            elif counter < self.counters[client]:
                heapq.heapreplace(heap, (self.counters[client], client))
            else:
                return client
        return None


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("order", "vtc", VirtualTokenCounter)
