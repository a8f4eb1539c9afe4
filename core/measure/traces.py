"""What a trace says of a workload: when its requests come, how long they are, and what a cache could save."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Protocol

from .metrics import percentile
from .plot import bars, columns
from .reuse import Reuse, ReuseLog

PERCENTILES = (50, 90, 99)
PEAK = 60.0  # seconds
WIDTH = 60  # columns of the picture of arrivals
CAPACITIES = tuple(digit * 10**power for power in range(9) for digit in (1, 2, 5))


class Row(Protocol):
    """What a line of a trace says."""

    @property
    def time(self) -> float: ...  # seconds, from any origin
    @property
    def input_len(self) -> int: ...  # tokens
    @property
    def output_len(self) -> int: ...  # tokens
    @property
    def block_ids(self) -> Sequence[Hashable] | None: ...
    @property
    def block_size(self) -> int: ...  # tokens
    @property
    def client(self) -> str: ...
    @property
    def session(self) -> str: ...


@dataclass
class Measured:
    """Three numbers per request and one per block: a million requests are 40 MB, a million blocks 4."""

    timed: bool = True
    times: array[float] = field(default_factory=lambda: array("d"))
    inputs: array[int] = field(default_factory=lambda: array("q"))
    outputs: array[int] = field(default_factory=lambda: array("q"))
    clients: Counter[str] = field(default_factory=Counter)  # requests of each that is named
    sessions: Counter[str] = field(default_factory=Counter)
    blocks: ReuseLog = field(default_factory=ReuseLog)

    @classmethod
    def of(cls, rows: Iterable[Row], timed: bool) -> Measured:
        found = cls(timed)
        for row in rows:
            found.times.append(row.time)
            found.inputs.append(row.input_len)
            found.outputs.append(row.output_len)
            found.blocks.add(row.input_len, row.block_ids, row.block_size)
            if row.client:
                found.clients[row.client] += 1
            if row.session:
                found.sessions[row.session] += 1
        return found

    def order(self) -> Any:
        """Places of the requests by time; equal times stay in the file's order."""
        import numpy as np

        return np.argsort(np.frombuffer(self.times, np.float64), kind="stable")

    def in_order_of_time(self) -> Iterator[tuple[float, int, int]]:
        """(seconds since the first request, input, output) of each."""
        order = self.order()
        origin = self.times[order[0]] if len(order) else 0.0
        for i in order.tolist():
            yield self.times[i] - origin, self.inputs[i], self.outputs[i]

    def summary(self) -> dict[str, Any]:
        """The numbers by name, as JSON has them."""
        found: dict[str, Any] = {"requests": len(self.times)} | (self._arrivals() if self.timed else {})
        for name, values in (("input_tokens", self.inputs), ("output_tokens", self.outputs)):
            found[name] = _lengths(values)
        for name, counts in (("clients", self.clients), ("sessions", self.sessions)):
            if counts:
                found[name] = len(counts)
                found[f"requests_per_{name[:-1]}"] = _lengths(array("q", counts.values()))
        reuse = self.blocks.measured(self.order())
        return found if reuse is None else found | {"reuse": _reuse(reuse)}

    def _arrivals(self) -> dict[str, Any]:
        import numpy as np

        times = np.sort(np.frombuffer(self.times, np.float64))
        gaps = np.diff(times)
        span = float(times[-1] - times[0])
        mean, spread = (float(gaps.mean()), float(gaps.std())) if len(gaps) else (0.0, 0.0)
        peak = int((np.searchsorted(times, times + PEAK, side="left") - np.arange(len(times))).max())
        edges = np.linspace(times[0], times[-1], WIDTH + 1)
        return {
            "span_s": span,
            "rate": len(times) / span if span else None,
            "peak_minute_rate": peak / PEAK if span >= PEAK else None,
            "mean_gap_s": mean,
            "gap_cv": spread / mean if mean else 0.0,
            "distinct_instants": int((gaps > 0).sum()) + 1,
            "rate_over_time": [float(n) * WIDTH / span for n in np.histogram(times, edges)[0]]
            if span
            else [],
        }


def _lengths(values: array[int]) -> dict[str, Any]:
    import numpy as np

    ordered: Any = np.sort(np.frombuffer(values, np.int64))
    total = sum(values)  # Python's integers do not overflow
    powers = Counter(int(value).bit_length() for value in ordered.tolist())
    return {
        "total": total,
        "mean": total / len(values),
        **{f"p{p}": float(percentile(ordered, p)) for p in PERCENTILES},
        "max": int(ordered[-1]),
        "histogram": {str(1 << power >> 1): powers[power] for power in range(min(powers), max(powers) + 1)},
    }


def _reuse(found: Reuse) -> dict[str, Any]:
    again = found.num_reused
    useful = [c for c in CAPACITIES if c >= found.num_distinct / 1000]
    capacities = list(takewhile(lambda c: c < found.num_distinct, useful))
    return {
        "block_size": found.block_size,
        "blocks": found.num_blocks,
        "distinct_blocks": found.num_distinct,
        "infinite_hit_rate": found.infinite,
        "infinite_hit_rate_second_half": found.second_half,
        "lru_hit_rate": {str(c): found.lru(c) for c in capacities},
        "reused_blocks": again,
        "reuse_distance": {f"p{p}": found.distance(p) for p in PERCENTILES} if again else {},
    }


# ---- for a person ----------------------------------------------------------------------------------------


def told(s: dict[str, Any]) -> str:
    """A summary as text, with its pictures."""
    lines = [*_told_arrivals(s)]
    lines += [_told_lengths(name, s[f"{name}_tokens"]) for name in ("input", "output")]
    for name in ("clients", "sessions"):
        if name in s:
            each = s[f"requests_per_{name[:-1]}"]
            shares = f"mean {each['mean']:,.1f}, P50 {each['p50']:,.0f}, most {each['max']:,}"
            lines.append(f"{name:<14} {s[name]:,}, requests of one: {shares}")
    if "reuse" in s:
        lines += _told_reuse(s["reuse"])
    else:
        lines.append("prefix reuse   not known: the trace does not say which prompts begin alike")
    return "\n".join([*lines, *_pictures(s)])


def _told_arrivals(s: dict[str, Any]) -> list[str]:
    if "span_s" not in s:
        return [f"requests       {s['requests']:,}; the trace does not say when they came"]
    rate = f", {s['rate']:,.2f} a second" if s["rate"] else ""
    peak = f", in the busiest minute {s['peak_minute_rate']:,.2f}" if s["peak_minute_rate"] else ""
    instants = s["distinct_instants"]
    clumps = f", {instants:,} distinct instants" if instants < s["requests"] else ""
    return [
        f"requests       {s['requests']:,} over {s['span_s']:,.1f} s{rate}{peak}",
        f"between them   mean {s['mean_gap_s']:.4f} s, coefficient of variation {s['gap_cv']:.2f} (1 is "
        f"Poisson){clumps}",
    ]


def _told_lengths(name: str, found: dict[str, Any]) -> str:
    shown = ", ".join(f"P{p} {found[f'p{p}']:,.0f}" for p in PERCENTILES)
    total = f"{found['total']:,} in all, mean {found['mean']:,.1f}"
    return f"{name + ' tokens':<14} {total}, {shown}, most {found['max']:,}"


def _told_reuse(found: dict[str, Any]) -> list[str]:
    size = found["block_size"]
    lines = [
        f"prefix blocks  {found['blocks']:,} of {size} tokens, {found['distinct_blocks']:,} distinct, "
        f"{found['reused_blocks']:,} touched again",
        f"infinite cache {found['infinite_hit_rate']:.2%} of prompt tokens hit, cold at the start; "
        f"{found['infinite_hit_rate_second_half']:.2%} in the second half of the requests",
    ]
    if found["reuse_distance"]:
        shown = ", ".join(f"{name.upper()} {value:,.0f}" for name, value in found["reuse_distance"].items())
        lines.append(f"reuse distance {shown} (distinct blocks touched in between)")
    return lines


def _pictures(s: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    if s.get("rate_over_time"):
        each, most = s["span_s"] / WIDTH, max(s["rate_over_time"])
        lines += [
            "",
            f"arrivals over time: a column is {each:,.1f} s, the highest {most:,.2f} requests a second",
        ]
        lines += [f"  {row}" for row in columns(s["rate_over_time"])]
    for name in ("input", "output"):
        found = s[f"{name}_tokens"]["histogram"]
        rows = [(f"{int(low):,}", float(n), f"{n / s['requests']:.1%}") for low, n in found.items()]
        lines += ["", f"{name} tokens: requests with at least so many, and less than twice as many"]
        lines += [f"  {row}" for row in bars(rows)]
    if rates := s.get("reuse", {}).get("lru_hit_rate"):
        size, top = s["reuse"]["block_size"], s["reuse"]["infinite_hit_rate"]
        rows = [(f"{int(blocks):,}", rate, f"{rate:.2%}") for blocks, rate in rates.items()]
        rows.append(("infinite", top, f"{top:.2%}"))
        lines += ["", f"hit rate of an LRU cache by its blocks of {size} tokens"]
        lines += [f"  {row}" for row in bars(rows)]
    return lines
