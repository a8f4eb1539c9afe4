"""The order that knows nothing."""

from __future__ import annotations

from dataclasses import dataclass

from headway import Context, KeyOrder, Registry, Request, hookimpl


@dataclass
class RandomOrder(KeyOrder):
    """Uniformly random, a baseline: each request draws one number when it arrives and keeps it, also through
    preemptions."""

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._draw: dict[int, float] = {}

    def key(self, request: Request) -> float:
        return self._draw[request.index]

    def on_arrival(self, request: Request, now: float) -> None:
        self._draw[request.index] = self.rng.random()
        super().on_arrival(request, now)

    def on_finish(self, request: Request, now: float) -> None:
        super().on_finish(request, now)
        self._draw.pop(request.index, None)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("order", "random", RandomOrder)
