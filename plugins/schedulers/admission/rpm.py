"""So many requests of a client per minute."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from headway import Admission, Admit, Context, Defer, Registry, Reject, Request, View, hookimpl, param

OVER = ("reject", "defer")


@dataclass
class RequestsPerMinute(Admission):
    """Rate limits as of public APIs, the RPM baseline of VTC (Sheng et al., OSDI'24, section 5.1): `limit`
    requests of a client per window.

    limit, window: of a client's requests that arrive within so many seconds, the first so many are taken.
    over: what is beyond is rejected ("reject"), or waits until the window has moved on ("defer").

    The window slides. Fair only to who asks little: it knows neither lengths nor load, so it also refuses
    what an idle server could do.
    """

    limit: int = param(20, min=1, max=2**31 - 1, unit="requests")
    window: float = param(60.0, above=0, max=1e9, unit="seconds")
    over: str = param("reject", choices=OVER)

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._taken: dict[str, deque[float]] = {}  # client -> when its requests of the last window were taken
        self._may: set[int] = set()  # index of requests that were taken and have not ended

    def admit(self, request: Request, view: View) -> Admit | Defer | Reject:
        if request.index in self._may:
            return Admit()
        taken = self._taken.setdefault(request.tags.client, deque())
        while taken and taken[0] + self.window <= view.now:
            taken.popleft()
        if len(taken) < self.limit:
            taken.append(view.now)
            self._may.add(request.index)
            return Admit()
        if self.over == "defer":
            return Defer(taken[0] + self.window)
        return Reject(
            f"client {request.tags.client!r} has {self.limit} requests per {self.window:g} s, and this is "
            "one more"
        )

    def on_finish(self, request: Request, now: float) -> None:
        self._may.discard(request.index)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("admission", "rpm", RequestsPerMinute)
