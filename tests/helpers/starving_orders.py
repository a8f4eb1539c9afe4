"""Orders that starve somebody: what the starvation check must find. Each is a rule that somebody might write
in good faith."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headway import Order, Request, View, hookimpl

RULES: dict[str, Callable[[Request], Any]] = {  # name -> key, the smallest first
    "longest_first": lambda r: -r.num_prompt_tokens,
    "shortest_first": lambda r: r.num_prompt_tokens,
    "newest_first": lambda r: (-r.arrival_time, -r.index),
    "client_a_first": lambda r: r.tags.client != "a",
    "client_b_first": lambda r: r.tags.client != "b",
    "last_client_first": lambda r: -ord(r.tags.client),
    "least_declared_first": lambda r: r.sampling.max_tokens,
    "most_declared_first": lambda r: -r.sampling.max_tokens,
    "extremes_first": lambda r: -abs(r.num_prompt_tokens - 24),
    "priority_upside_down": lambda r: -r.tags.priority,
    "far_deadlines_first": lambda r: -(r.slo.ttft or 0.0),
    "without_a_deadline_first": lambda r: r.slo.ttft is not None,
    "old_sessions_first": lambda r: -r.tags.turn,
    "new_sessions_first": lambda r: r.tags.turn,
    "batch_last": lambda r: r.tags.category == "batch",
    "batch_first": lambda r: r.tags.category != "batch",
}


@dataclass
class By(Order):
    """The waiting requests by a key; of those, at most so many a step."""

    rule: str = ""
    at_most: int = 256

    def order(self, view: View) -> list[Request]:
        return sorted(view.waiting, key=RULES[self.rule])[: self.at_most]


@dataclass
class MostServedClientFirst(Order):
    """Whoever got most gets more."""

    def setup(self, ctx: Any) -> None:
        super().setup(ctx)
        self.served: dict[str, int] = {}

    def on_admit(self, request: Request, now: float) -> None:
        self.served[request.tags.client] = self.served.get(request.tags.client, 0) + request.num_prompt_tokens

    def order(self, view: View) -> list[Request]:
        return sorted(view.waiting, key=lambda r: -self.served.get(r.tags.client, 0))


@hookimpl
def headway_register(registry):
    registry.add("order", "by", By)
    registry.add("order", "most_served_client_first", MostServedClientFirst)
