"""Deficit longest prefix match."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from headway import ConfigError, Context, Registry, Request, StepRecord, View, hookimpl, param

from .clients import ClientOrder


@dataclass
class DeficitLongestPrefix(ClientOrder):
    """DLPM (Cao et al., arXiv 2501.14312, section 4): longest cached prefix first, among clients whose
    deficit is not used up.

    quantum: service that every waiting client is given when all of them have used theirs up; larger is more
    local and less fair. wp, wq: service of a prompt token that was not cached, charged at admission, and of a
    generated token. window: waiting requests that are looked at in a step, an equal number of each client's
    oldest.

    A client that leaves the queue keeps its debt and loses what it has left. Preempted requests are not
    charged a second time.
    """

    may_starve = "fair among clients; within one, requests with longer cached prefixes may keep coming"
    quantum: float = param(1024.0, min=1, max=1e12)
    wp: float = param(1.0, min=0, max=1e6)
    wq: float = param(2.0, min=0, max=1e6)
    window: int = param(128, min=1, max=1_000_000, unit="requests")

    def __post_init__(self) -> None:
        if self.wp == self.wq == 0:
            raise ConfigError("order.wp=0, order.wq=0: expected one of them above 0, or nobody is charged")

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self.deficits: dict[str, float] = {}

    def order(self, view: View) -> Iterator[Request]:
        deficits = self.deficits
        pending = self._candidates()
        clients = list(dict.fromkeys(request.tags.client for request in pending))
        pending.sort(key=lambda request: (-view.match(request).num_tokens, request.sort_key))
        while pending:
            later = []
            for request in pending:
                if deficits[request.tags.client] > 0:
                    yield request
                else:
                    later.append(request)
            pending = later
            clients = [client for client in clients if client in self.queues]
            if any(deficits[client] > 0 for client in clients):
                return  # who has some left goes on in the next step, with the next of its requests
            self._refill(clients)

    def _candidates(self) -> list[Request]:
        share, found = max(1, self.window // max(1, len(self.queues))), []
        for queue in self.queues.values():
            found += queue[:share]
            if len(found) >= self.window:
                break
        return found

    def _refill(self, clients: list[str]) -> None:
        """As many quanta for each as the least indebted needs to go on."""
        most = max((self.deficits[client] for client in clients), default=0.0)
        given = self.quantum * (int(-most / self.quantum) + 1)
        for client in clients:
            self.deficits[client] += given

    def on_arrival(self, request: Request, now: float) -> None:
        client = request.tags.client
        if client not in self.queues:
            self.deficits[client] = min(0.0, self.deficits.get(client, 0.0))
        super().on_arrival(request, now)

    def on_admit(self, request: Request, now: float) -> None:
        super().on_admit(request, now)
        if request.num_admissions == 1:
            self.deficits[request.tags.client] -= self.wp * (
                request.num_prompt_tokens - request.num_cached_tokens
            )

    def on_step_end(self, record: StepRecord) -> None:
        for request, new in zip(record.plan.requests, record.tokens, strict=True):
            for _ in new:
                self.deficits[request.tags.client] -= self.wq


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("order", "dlpm", DeficitLongestPrefix)
