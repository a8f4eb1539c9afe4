"""`python -m headway trace`: a trace file, measured in one pass and without making a token."""

from __future__ import annotations

import argparse
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..compose.hooks import load_registry
from ..errors import HeadwayError
from ..measure.metrics import percentile


class Row(Protocol):
    """What a line of a trace says."""

    @property
    def time(self) -> float: ...  # seconds, from any origin
    @property
    def input_len(self) -> int: ...  # tokens
    @property
    def output_len(self) -> int: ...  # tokens


class Readable(Protocol):
    """What this verb asks of the workload `trace`."""

    def read(self) -> Iterator[Row]:
        """The rows of the file, in its own order."""


@dataclass
class Measured:
    """Three numbers a request: a million requests are 24 MB."""

    times: array[float] = field(default_factory=lambda: array("d"))
    inputs: array[int] = field(default_factory=lambda: array("q"))
    outputs: array[int] = field(default_factory=lambda: array("q"))

    @classmethod
    def of(cls, rows: Iterator[Row]) -> Measured:
        found = cls()
        for row in rows:
            found.times.append(row.time)
            found.inputs.append(row.input_len)
            found.outputs.append(row.output_len)
        return found

    def in_order_of_time(self) -> Iterator[tuple[float, int, int]]:
        """(seconds since the first request, input, output) of each; equal times stay in the file's order."""
        import numpy as np

        order = np.argsort(np.frombuffer(self.times, np.float64), kind="stable")
        origin = self.times[order[0]] if len(order) else 0.0
        for i in order.tolist():
            yield self.times[i] - origin, self.inputs[i], self.outputs[i]

    def __str__(self) -> str:
        import numpy as np

        times = np.sort(np.frombuffer(self.times, np.float64))
        gaps = np.diff(times)
        span = float(times[-1] - times[0])
        mean, spread = (float(gaps.mean()), float(gaps.std())) if len(gaps) else (0.0, 0.0)
        rate = f", {len(times) / span:,.2f} a second" if span else ""
        variation = spread / mean if mean else 0.0
        lines = (
            f"requests       {len(times):,} over {span:,.1f} s{rate}",
            f"between them   mean {mean:.4f} s, coefficient of variation {variation:.2f} (1 is Poisson)",
            _lengths("input tokens", self.inputs),
            _lengths("output tokens", self.outputs),
        )
        return "\n".join(lines)


def _lengths(name: str, values: array[int]) -> str:
    import numpy as np

    ordered: Any = np.sort(np.frombuffer(values, np.int64))
    total = sum(values)  # Python's integers do not overflow
    shown = ", ".join(f"P{p} {percentile(ordered, p):,.0f}" for p in (50, 90, 99))
    return f"{name:<14} {total:,} in all, mean {total / len(values):,.1f}, {shown}, most {int(ordered[-1]):,}"


def trace(argv: list[str]) -> int:
    about = "Requests, lengths and arrivals of a trace file."
    parser = argparse.ArgumentParser(prog="python -m headway trace", description=about)
    parser.add_argument("path")
    parser.add_argument("--format", default="mooncake", help="azure, mooncake, burstgpt")
    parser.add_argument("--limit", type=int, help="only the first so many requests")
    parser.add_argument("--out", type=Path, help="also write JSON lines: time, input_len, output_len")
    options = parser.parse_args(argv)
    plugin = load_registry().get("workload", "trace")
    workload: Readable = plugin.build(path=options.path, format=options.format, limit=options.limit)
    measured = Measured.of(workload.read())
    if not measured.times:
        raise HeadwayError(f"{options.path}: holds no request")
    print(measured)
    if options.out:
        _write(measured, options.out, Path(options.path))
    return 0


def _write(measured: Measured, out: Path, source: Path) -> None:
    """Whole or not at all, and never over the trace itself."""
    if out.exists() and source.expanduser().exists() and out.samefile(source.expanduser()):
        raise HeadwayError(f"--out {out}: is the trace itself; name another file")
    scratch = out.with_name(f"{out.name}.part")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            for time, input_len, output_len in measured.in_order_of_time():
                row = {"time": time, "input_len": input_len, "output_len": output_len}
                file.write(json.dumps(row) + "\n")
        scratch.replace(out)
    except OSError as error:
        raise HeadwayError(f"--out {out}: cannot be written ({error})") from error
