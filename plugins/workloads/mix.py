"""Who asks, how urgently and with which targets: parameters that every workload has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from random import Random
from typing import ClassVar

from headway import SLO, Arrival, Workload, WorkloadError, param

MOST = 1_000_000


@dataclass
class Mix(Workload):
    """Deals requests to clients, priorities, adapters and SLO tiers. All requests of a session are dealt
    alike; null leaves what the workload says."""

    clients: int | None = param(None, min=1, max=MOST, doc="requests are dealt to so many clients, in turn")
    client_skew: float | None = param(
        None, min=0, max=100, doc="dealt at random instead: the k-th client has a share of 1 / k ** skew"
    )
    priorities: int | None = param(
        None, min=1, max=MOST, doc="priority classes, drawn uniformly; 0 is the most urgent"
    )
    adapters: int | None = param(
        None, min=1, max=MOST, doc="adapters of the model, drawn uniformly; no two share cached prefixes"
    )
    salt: str = param(
        "",
        choices=("", "client", "session"),
        doc="requests share cached prefixes with those of the same one alone",
    )
    slo_tiers: list[SLO] | None = param(
        None,
        doc="latency targets, drawn uniformly: [{ttft: 0.5}, {ttft: 5, tpot: 0.2}]; slo.* is for the rest",
    )
    slo_shares: list[float] | None = param(
        None, min=0, max=1e9, doc="weight of each tier, where they are not alike"
    )

    dealt_by_itself: ClassVar[tuple[str, ...]] = ()  # parameters of these that a workload takes care of

    def mixed(self, arrivals: Iterable[Arrival], seed: int) -> Iterator[Arrival]:
        """Requests, in the order in which the workload makes them, with their tags and targets."""
        self._mix_seed = f"{seed}/mix"
        self._dealt: dict[str, int] = {}
        weights = (k ** -(self.client_skew or 0.0) for k in range(1, (self.clients or 1) + 1))
        self._shares = list(accumulate(weights))
        self._tier_shares = self._of_tiers()
        return (self.dealt(arrival, i) for i, arrival in enumerate(arrivals))

    def dealt(self, arrival: Arrival, number: int = 0) -> Arrival:
        """`number` is the request's place in the order; the first request of a session decides for the
        others."""
        own = [n for n in ("clients", "priorities", "adapters", "slo_tiers") if getattr(self, n) is not None]
        own = [n for n in own if n not in self.dealt_by_itself]
        if not own:
            return self._salted(arrival)
        if session := arrival.tags.session:
            number = self._dealt.setdefault(session, len(self._dealt))
        rng = Random(f"{self._mix_seed}/{session or number}")
        # all drawn, so that none depends on another
        client, priority, tier, adapter = (rng.random() for _ in range(4))
        tags, slo = arrival.tags, arrival.slo
        if "clients" in own:
            tags = replace(tags, client=f"c{self._dealt_client(number, client)}")
        if "priorities" in own:
            tags = replace(tags, priority=int(priority * (self.priorities or 1)))
        if "adapters" in own:
            tags = replace(tags, adapter=f"a{int(adapter * (self.adapters or 1))}")
        if "slo_tiers" in own and slo == SLO() and self.slo_tiers:
            slo = self.slo_tiers[_share_of(tier, self._tier_shares)]
        return self._salted(replace(arrival, tags=tags, slo=slo))

    def _salted(self, arrival: Arrival) -> Arrival:
        """With the salts that it is given here behind its own: adapters compute other KV of the same
        tokens."""
        tags = arrival.tags
        chosen = {"client": tags.client, "session": tags.session}.get(self.salt, "")
        salts = [salt for salt in (arrival.cache_salt, tags.adapter, chosen) if salt]
        return replace(arrival, cache_salt="/".join(salts)) if salts else arrival

    def _dealt_client(self, number: int, drawn: float) -> int:
        return number % len(self._shares) if self.client_skew is None else _share_of(drawn, self._shares)

    def _of_tiers(self) -> list[float]:
        """Shares of the tiers, added up. Raises WorkloadError for shares that are not one for each tier, or
        all 0."""
        tiers, shares = self.slo_tiers or [], self.slo_shares
        if shares is None:
            return list(accumulate(1.0 for _ in tiers))
        if len(shares) != len(tiers) or not sum(shares) > 0:
            expected = f"one for each of the {len(tiers)} workload.slo_tiers, not all of them 0"
            raise WorkloadError(f"workload.slo_shares={shares}: expected {expected}")
        return list(accumulate(shares))


def _share_of(drawn: float, shares: Sequence[float]) -> int:
    """Whose share of shares, added up, a number from 0 to 1 falls into."""
    return next(k for k, upto in enumerate(shares) if drawn * shares[-1] < upto)
