"""Shortest remaining processing time."""

from __future__ import annotations

from dataclasses import dataclass

from headway import Registry, Request, hookimpl

from .sjf import ShortestFirst


@dataclass
class ShortestRemaining(ShortestFirst):
    """Fewest predicted output tokens left first (Schrage and Miller, 1966).

    Tokens that are generated already are not counted, so a preempted request comes back with what is left of
    it. The preemption itself is scheduler=preemptive: there a waiting request displaces a running one with
    more left. A request that outlives its prediction has nothing left and so ranks first.
    """

    def key(self, request: Request) -> float:
        return max(0.0, self._length[request.index] - request.num_output_tokens)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("order", "srpt", ShortestRemaining)
