"""Earliest deadline first."""

from __future__ import annotations

from dataclasses import dataclass

from headway import KeyOrder, Registry, Request, hookimpl

NEVER = float("inf")


def deadline(request: Request) -> float:
    """When the request must be done, by its SLO, in seconds on the run's clock: its last token where it has
    an e2el target, else its next token (ttft for the first, then one tpot each); never without a target."""
    slo, arrival = request.slo, request.arrival_time
    if slo.e2el is not None:
        return arrival + slo.e2el
    if slo.ttft is not None:
        return arrival + slo.ttft + request.num_output_tokens * (slo.tpot or 0.0)
    return NEVER


@dataclass
class EarliestDeadline(KeyOrder):
    """Earliest SLO deadline first (Liu and Layland, JACM 1973, section 7); requests without a target come
    last, by arrival.

    The deadline is that of the last token (slo.e2el), or else of the next one (slo.ttft, slo.tpot). On one
    server it meets every deadline that any order can meet for requests that are there together, and with
    scheduler=preemptive for those that arrive over time, as far as recomputation is cheap.
    """

    may_starve = "a request without a target waits for all that have one"
    requires = ("slo",)

    def key(self, request: Request) -> float:
        return deadline(request)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("order", "edf", EarliestDeadline)
