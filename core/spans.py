"""Sets of token positions as disjoint spans (first, last), `last` not included: which positions of a request
were computed before."""

from __future__ import annotations

Spans = tuple[tuple[int, int], ...]


def overlap(spans: Spans, start: int, end: int) -> int:
    """How many positions of [start, end) are in the set."""
    return sum(max(0, min(end, last) - max(start, first)) for first, last in spans)


def union(spans: Spans, start: int, end: int) -> Spans:
    """The set and [start, end)."""
    if start >= end:
        return spans
    apart = tuple(span for span in spans if span[1] < start or end < span[0])
    touching = [span for span in spans if span not in apart]
    return (
        *apart,
        (min([start, *(first for first, _ in touching)]), max([end, *(last for _, last in touching)])),
    )
