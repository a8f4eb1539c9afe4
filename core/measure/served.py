"""What a server's clients saw: the file of `vllm bench serve --save-result --save-detailed`, its requests,
their figures, and the steps that the server must have made.

The file knows when each request was sent, how long its prompt was, and when each piece of its answer came.
Tokens of one step come together, and no request gets two in one step, so the pieces say when steps ended and
what they held. Only where a prompt was computed is not seen: as late as a step's budget allows, and none of
it is taken to have been cached.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..inputs import SLO, Tags
from ..outputs import RequestOutput, RunResult
from .metrics import summarize

#: Metrics that clients see.
SEEN = (
    "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_itl_ms", "mean_e2el_ms", "p99_e2el_ms",
    "output_throughput",
)  # fmt: skip
COLUMNS = ("start_times", "input_lens", "output_lens", "ttfts", "itls")
TOGETHER = 0.5  # of the P10 of all gaps between two tokens: what comes within is of one step


@dataclass(frozen=True)
class Served:
    """A request that was answered. Seconds since the first request was sent."""

    time: float
    input_len: int
    output_len: int
    token_times: list[float]  # of the pieces of its answer; one may hold several tokens


def served_requests(document: dict[str, Any]) -> list[Served]:
    """The answered requests of such a file, in order of time. Raises ValueError that says what is wrong."""
    if missing := [name for name in COLUMNS if name not in document]:
        how = "`vllm bench serve` writes them with --save-result --save-detailed"
        raise ValueError(f"lacks {', '.join(missing)}: {how}")
    columns = [document[name] for name in COLUMNS]
    errors = document.get("errors") or [""] * len(columns[0])
    sizes = {name: len(column) for name, column in zip((*COLUMNS, "errors"), (*columns, errors), strict=True)}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"its columns are of different lengths: {sizes}")
    found = []
    for number, (*row, error) in enumerate(zip(*columns, errors, strict=True)):
        if not error and row[2]:
            found.append(_request(number, *row))
    if not found:
        raise ValueError("none of its requests was answered")
    first = min(request.time for request in found)
    return sorted((_later(request, -first) for request in found), key=lambda request: request.time)


def _request(number: int, start: Any, prompt: Any, answer: Any, ttft: Any, gaps: Any) -> Served:
    whole = all(type(n) is int and n > 0 for n in (prompt, answer))
    seconds: list[Any] = [ttft, *gaps] if isinstance(gaps, list) else [None]
    times = all(isinstance(s, (int, float)) and isfinite(s) and s >= 0 for s in seconds)
    if not (whole and times and isinstance(start, (int, float)) and isfinite(start)):
        shown = str([start, prompt, answer, ttft, gaps])[:80]
        raise ValueError(
            f"request {number} is {shown}: expected a start, two lengths, a TTFT and gaps, in seconds"
        )
    if len(gaps) >= answer:
        raise ValueError(f"request {number} has {len(gaps) + 1} pieces of an answer of {answer} tokens")
    found, now = [], float(start)
    for gap in seconds:
        now += gap
        found.append(now)
    return Served(float(start), prompt, answer, found)


def _later(request: Served, seconds: float) -> Served:
    times = [time + seconds for time in request.token_times]
    return Served(request.time + seconds, request.input_len, request.output_len, times)


def read_served(path: Path, option: str) -> list[Served]:
    """Raises ConfigError, which names the option that gave the path."""
    try:
        document = json.loads(path.read_bytes())
        if not isinstance(document, dict):
            raise ValueError("holds no JSON object")
        return served_requests(document)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option}={path}: {getattr(error, 'strerror', None) or error}") from error


def seen(requests: Sequence[Served]) -> dict[str, float]:
    """The figures of SEEN."""
    outputs = [
        RequestOutput(
            id=f"r{index}",
            index=index,
            state="finished",
            finish_reason="length",
            arrival_time=request.time,
            first_scheduled_time=request.time,
            finish_time=request.token_times[-1],
            num_prompt_tokens=request.input_len,
            num_cached_tokens=0,
            num_preemptions=0,
            num_recomputed_tokens=0,
            output_token_ids=[0] * request.output_len,
            token_times=request.token_times,
            tags=Tags(),
            slo=SLO(),
        )
        for index, request in enumerate(requests)
    ]
    last = max(output.finish_time for output in outputs)
    summary = summarize(RunResult(outputs=outputs, duration=last))
    return {name: summary[name] for name in SEEN}


# ---- steps -------------------------------------------------------------------------------------------------


def served_steps(requests: Sequence[Served], budget: int) -> list[tuple[Sequence[int], Sequence[int], float]]:
    """Starts and lengths of the chunks of each step, and its seconds. `budget`: most tokens of one."""
    ends, firsts, lasts, decodes = _steps(requests)
    used = [len(chunks) for chunks in decodes]
    prompts: list[list[tuple[int, int]]] = [[] for _ in ends]
    for request, last in sorted(zip(requests, firsts, strict=True), key=lambda pair: pair[1]):
        # A step is planned when the one before it ends, so the first that can hold the prompt is the one
        # behind the one in which the request came.
        earliest = min(last, bisect_right(ends, request.time) + 1)
        left, step = request.input_len, last
        while left:
            chunk = left if step == earliest else min(left, max(0, budget - used[step]))
            if chunk:
                left -= chunk
                used[step] += chunk
                prompts[step].append((left, chunk))
            step = max(earliest, step - 1)
    arrivals = [request.time for request in requests]
    ended = sorted(lasts)
    found: list[tuple[Sequence[int], Sequence[int], float]] = []
    before = 0.0
    for step, (end, ongoing, new) in enumerate(zip(ends, decodes, prompts, strict=True)):
        present = bisect_right(arrivals, before)
        busy = present > bisect_right(ended, step - 1)
        began = before if busy or present == len(arrivals) else max(before, arrivals[present])
        starts, lengths = [*ongoing, *(start for start, _ in new)], [1] * len(ongoing) + [n for _, n in new]
        if starts and end > began:
            found.append((starts, lengths, end - began))
        before = end
    return found


def _steps(requests: Sequence[Served]) -> tuple[list[float], list[int], list[int], list[list[int]]]:
    """When steps ended; in which of them each request got its first token, and its last; positions of the
    tokens that each step decoded."""
    pieces = sorted(
        (time, number, place)
        for number, request in enumerate(requests)
        for place, time in enumerate(request.token_times)
    )
    gaps = sorted(b - a for r in requests for a, b in zip(r.token_times, r.token_times[1:], strict=False))
    apart = TOGETHER * gaps[len(gaps) // 10] if gaps else 0.0
    ends: list[float] = []
    firsts, lasts, decodes = [0] * len(requests), [0] * len(requests), list[list[int]]()
    got: set[int] = set()
    before = float("-inf")
    for time, number, place in pieces:
        if time - before > apart or number in got:
            ends.append(time)
            decodes.append([])
            got.clear()
        got.add(number)
        before, lasts[number] = time, len(ends) - 1
        if place:
            decodes[-1].append(requests[number].input_len + place - 1)
        else:
            firsts[number] = len(ends) - 1
    return ends, firsts, lasts, decodes
