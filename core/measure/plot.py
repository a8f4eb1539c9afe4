"""Pictures in text: what a terminal, a log and a pull request can all show."""

from __future__ import annotations

from collections.abc import Sequence

_UP = " ▁▂▃▄▅▆▇█"  # eighths of a character, from the bottom
_RIGHT = " ▏▎▍▌▋▊▉█"  # from the left


def columns(values: Sequence[float], height: int = 4) -> list[str]:
    """A column per value, the largest as high as the picture, from the top line down; anything above 0
    shows."""
    top = max(values, default=0.0)
    steps = 8 * height
    heights = [max(1, round(value / top * steps)) if top and value > 0 else 0 for value in values]
    lines = ("".join(_UP[min(8, max(0, h - 8 * row))] for h in heights) for row in reversed(range(height)))
    return [line.rstrip() for line in lines]


def bars(rows: Sequence[tuple[str, float, str]], width: int = 50, most: float | None = None) -> list[str]:
    """A bar per row of (label, value, what stands behind the bar). `most` is the value that fills the
    width."""
    largest = most or max((value for _, value, _ in rows), default=0.0) or 1.0
    edge = max((len(label) for label, _, _ in rows), default=0)
    lines = []
    for label, value, told in rows:
        eighths = max(1, round(value / largest * width * 8)) if value > 0 else 0
        bar = "█" * (eighths // 8) + (_RIGHT[eighths % 8] if eighths % 8 else "")
        lines.append(f"{label:>{edge}} {bar} {told}".rstrip())
    return lines
