"""Fairness between clients, from a run's outputs. Definitions are those of VTC (Sheng et al., OSDI'24).

docs/metrics.md states them. Every client that asked counts, also one that was never served: a policy that
starves a client must not look fair for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..outputs import RequestOutput

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0  # a token's service, as in VTC: w_p and w_q


@dataclass(frozen=True)
class ClientService:
    """What one client asked and got. Times are seconds on the run's clock, service is in weighted tokens."""

    outputs: Sequence[RequestOutput]
    run_end: float

    @cached_property
    def _steps(self) -> tuple[Any, Any]:
        """(times at which service came, service up to and including each)."""
        import numpy as np

        times, amounts = [], []
        for o in self.outputs:
            if o.token_times:
                times += [o.token_times[0], *o.token_times]
                amounts += [o.num_prompt_tokens * PROMPT_WEIGHT, *[OUTPUT_WEIGHT] * len(o.token_times)]
        # Many tokens come with one step.
        when, which = np.unique(np.array(times, np.float64), return_inverse=True)
        return when, np.concatenate(([0.0], np.cumsum(np.bincount(which, amounts, len(when)))))

    def service(self, until: Any) -> Any:
        """Service up to and including a time, or each of an array of times."""
        times, total = self._steps
        return total[times.searchsorted(until, side="right")]

    def times(self, begin: float, end: float) -> Any:
        """When service came, in (begin, end]."""
        times, _ = self._steps
        return times[times.searchsorted(begin, side="right") : times.searchsorted(end, side="right")]

    @property
    def served(self) -> bool:
        return any(o.token_times for o in self.outputs)

    @property
    def first_arrival(self) -> float:
        return min(o.arrival_time for o in self.outputs)

    @property
    def last_end(self) -> float:
        """Its last request left the system. A client that was never served is not done before the end of the
        run."""
        return max(o.finish_time for o in self.outputs) if self.served else self.run_end

    @property
    def backlogged(self) -> list[tuple[float, float]]:
        """When it had a request that waited for its first step. One that was never served waits from its
        first arrival on."""
        if not self.served:
            return [(self.first_arrival, self.run_end)]
        started = [(o, o.first_scheduled_time >= 0) for o in self.outputs]
        waits = [(o.arrival_time, o.first_scheduled_time if ran else o.finish_time) for o, ran in started]
        merged: list[tuple[float, float]] = []
        for begin, end in sorted(wait for wait in waits if wait[0] < wait[1]):
            if merged and begin <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], end))
            else:
                merged.append((begin, end))
        return merged


def by_client(outputs: Iterable[RequestOutput]) -> dict[str, ClientService]:
    """Every client that asked, by name. Requests that name no client are nobody's."""
    own: dict[str, list[RequestOutput]] = {}
    run_end = 0.0
    for o in outputs:
        run_end = max(run_end, o.finish_time, *o.token_times[-1:])
        if o.tags.client:
            own.setdefault(o.tags.client, []).append(o)
    return {client: ClientService(asked, run_end) for client, asked in own.items()}


def fairness(outputs: Iterable[RequestOutput]) -> dict[str, Any]:
    """Number of clients, largest service difference, and Jain's index where anybody was served while all
    were there. Empty for fewer than two clients."""
    clients = list(by_client(outputs).values())
    if len(clients) < 2:
        return {}
    begin = max(c.first_arrival for c in clients)
    end = min(c.last_end for c in clients)
    got = [float(c.service(end) - c.service(begin)) if begin < end else 0.0 for c in clients]
    found = {"num_clients": len(clients), "service_difference": service_difference(clients)}
    index = jain(got)
    return found if math.isnan(index) else found | {"jain_index": index}


def service_difference(clients: Sequence[ClientService]) -> float:
    """The largest |W_f(t1, t2) - W_g(t1, t2)| of any two clients over any interval in which both are
    backlogged throughout.

    This is what VTC's theorem bounds, by 2 max(w_p longest prompt, w_q KV tokens). 0 where no two were
    backlogged at once.
    """
    import numpy as np

    spells = [(begin, end, i) for i, client in enumerate(clients) for begin, end in client.backlogged]
    if not spells:
        return 0.0
    begins, ends, owners = (np.array(column) for column in zip(*spells, strict=True))
    most = np.array([float(clients[i].service(end) - clients[i].service(begin)) for begin, end, i in spells])
    order = np.argsort(-most, kind="stable")
    begins, ends, owners, most = begins[order], ends[order], owners[order], most[order]
    worst = 0.0
    for k in range(len(spells)):
        if most[k] <= worst:  # in no spell from here on did anybody get more, so no difference can be larger
            break
        mine = clients[owners[k]]
        lows, highs = np.maximum(begins[k], begins[k + 1 :]), np.minimum(ends[k], ends[k + 1 :])
        together = np.flatnonzero((lows < highs) & (owners[k + 1 :] != owners[k]))
        got = mine.service(highs[together]) - mine.service(lows[together])
        bounds = np.maximum(got, most[k + 1 :][together])
        for at in np.argsort(-bounds, kind="stable"):
            if bounds[at] <= worst:
                break
            j = together[at]
            worst = max(worst, _spread(mine, clients[owners[k + 1 + j]], float(lows[j]), float(highs[j])))
    return worst


def _spread(one: ClientService, other: ClientService, begin: float, end: float) -> float:
    """The largest change of one's lead over the other between any two times in [begin, end]."""
    import numpy as np

    def lead(at: Any) -> Any:
        return one.service(at) - other.service(at)

    # The lead grows only when `one` is served, and shrinks only when `other` is.
    most = lead(np.append(begin, one.times(begin, end))).max()
    least = lead(np.append(begin, other.times(begin, end))).min()
    return float(most - least)


def jain(values: Sequence[float]) -> float:
    """(sum x)^2 / (n sum x^2): 1 when all are equal, 1/n when one has everything; nan where nobody has
    any."""
    squares = math.fsum(v * v for v in values)
    return math.fsum(values) ** 2 / (len(values) * squares) if squares else math.nan
