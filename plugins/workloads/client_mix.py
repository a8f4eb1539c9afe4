"""ServeGen's mixes of clients (Xiang et al., 2025): each client has its own rate, burstiness and lengths, by
the time of day."""

from __future__ import annotations

import ast
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from heapq import merge
from itertools import accumulate
from operator import attrgetter
from random import Random
from typing import NamedTuple

from headway import WorkloadError

from .lines import Lines, Malformed, json_object, parsed
from .numbers import count, seconds
from .trace_rows import Row, Source, csv_table, required

COLUMNS = ("client", "window_start_s", "rate_req_per_s", "iat_distribution", "param1")
LENGTH_KEYS = ("client", "window_start_s", "input_tokens", "output_tokens")


class Window(NamedTuple):
    """A client's arrivals from `start` to the next window."""

    start: float
    rate: float
    distribution: str
    shape: float


class Lengths(NamedTuple):
    """What prompts or answers of a client measure: lengths, and their probabilities added up."""

    values: list[int]
    upto: list[float]

    def draw(self, rng: Random) -> int:
        at = bisect_right(self.upto, rng.random() * self.upto[-1])
        return self.values[min(at, len(self.values) - 1)]


def servegen(lines: Lines, source: Source) -> Iterator[Row]:
    """Requests drawn from the mix, from second `start` on for `duration` seconds, in order of time.

    The file holds rates (client, window_start_s, rate_req_per_s, iat_distribution, param1: the shape of the
    gaps), `lengths` names the one with the distributions of lengths. Gaps have the recorded shape and the
    mean that the rate says; prompts and answers are drawn independently.
    """
    if not source.lengths:
        raise WorkloadError(f"{source.path}: ServeGen's rates say nothing of lengths: give lengths=FILE")
    clients = _windows(lines)
    lengths = dict(_by_client(source.lengths))
    streams = (
        _requests(client, windows, lengths.get(client, {}), source) for client, windows in clients.items()
    )
    yield from merge(*streams, key=attrgetter("time"))


def _windows(lines: Lines) -> dict[int, list[Window]]:
    found: dict[int, list[Window]] = {}
    for number, (client, start, rate, distribution, shape) in csv_table(lines, *COLUMNS):
        window = Window(
            seconds(number, "window_start_s", start),
            seconds(number, "rate_req_per_s", rate),
            distribution,
            seconds(number, "param1", shape),
        )
        if window.rate < 0 or (window.rate and (distribution not in _GAPS or not window.shape > 0)):
            gaps = f"{distribution!r} of shape {shape}"
            raise Malformed(
                number, f"rate {rate} with gaps {gaps}: expected {' or '.join(_GAPS)} of a shape above 0"
            )
        own = found.setdefault(count(number, "client", client), [])
        if own and window.start <= own[-1].start:
            raise Malformed(
                number, f"window_start_s {start} runs backwards: the window before it is at {own[-1].start}"
            )
        own.append(window)
    return found


#: Gaps of mean 1 by the name of their distribution.
_GAPS: dict[str, Callable[[Random, float], float]] = {
    "Gamma": lambda rng, shape: rng.gammavariate(shape, 1 / shape),
    "Weibull": lambda rng, shape: rng.weibullvariate(1 / math.gamma(1 + 1 / shape), shape),
}


def _times(windows: list[Window], start: float, end: float, rng: Random) -> Iterator[float]:
    """A renewal process whose clock runs at the window's rate: its gaps carry over from one window to the
    next. The last window is as long as the one before it."""
    left = -1.0  # of the gap, in mean gaps
    width = windows[-1].start - windows[-2].start if len(windows) > 1 else math.inf
    ends = [*(window.start for window in windows[1:]), windows[-1].start + width]
    for window, last in zip(windows, ends, strict=True):
        begin, until = max(window.start, start), min(last, end)
        if window.rate == 0 or begin >= until:
            continue
        draw = _GAPS[window.distribution]
        if left < 0:
            left = rng.random() * draw(rng, window.shape)  # the process has been going on
        while begin + left / window.rate < until:
            begin += left / window.rate
            yield begin
            left = draw(rng, window.shape)
        left -= (until - begin) * window.rate


def _requests(
    client: int,
    windows: list[Window],
    lengths: dict[float, tuple[Lengths, Lengths]],
    source: Source,
) -> Iterator[Row]:
    rng = Random(f"{source.seed}/servegen/{client}")
    starts = sorted(lengths)
    for time in _times(windows, source.start, source.start + source.duration, rng):
        if not starts:
            raise WorkloadError(
                f"{source.lengths}: holds no lengths of client {client}, which asks at {time:.0f} s"
            )
        inputs, outputs = lengths[starts[max(0, bisect_right(starts, time) - 1)]]
        yield Row(time, inputs.draw(rng), outputs.draw(rng), client=f"c{client}")


def _by_client(path: str) -> Iterator[tuple[int, dict[float, tuple[Lengths, Lengths]]]]:
    found: dict[int, dict[float, tuple[Lengths, Lengths]]] = {}
    for client, start, both in parsed(path, "ServeGen's lengths, one JSON object a line", _lengths):
        found.setdefault(client, {})[start] = both
    yield from found.items()


def _lengths(lines: Lines) -> Iterator[tuple[int, float, tuple[Lengths, Lengths]]]:
    for number, text in lines:
        entry = json_object(number, text)
        required(number, entry, LENGTH_KEYS)
        inputs, outputs = (_distribution(number, key, entry[key]) for key in LENGTH_KEYS[2:])
        if inputs.values and outputs.values:  # nothing was measured in the other windows
            start = seconds(number, "window_start_s", entry["window_start_s"])
            yield count(number, "client", entry["client"]), start, (inputs, outputs)


def _distribution(line: int, name: str, text: str) -> Lengths:
    """A Python dict in a string: {length: probability}."""
    try:
        found = ast.literal_eval(text)
        shares = [float(share) for share in found.values()]
        if not all(0 <= share < math.inf for share in shares):
            raise ValueError("a share below 0")
        return Lengths([count(line, name, value) for value in found], list(accumulate(shares)))
    except Malformed:
        raise
    except (ValueError, TypeError, SyntaxError, AttributeError, RecursionError, MemoryError) as error:
        raise Malformed(
            line, f"{name} {str(text)[:40]!r}: expected {{length: probability}} ({error})"
        ) from None
