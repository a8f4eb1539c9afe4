"""Step times fitted to steps that ran: of a calibration's loads, or of any recorded run.

The fit is least squares of the relative error over the terms of `Profile`, none below 0, without the steps
that something else on the machine stretched; its error is of steps that it has not seen, a fifth of them at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from headway import ConfigError, read_served, served_steps

from .profile import KINDS, TERMS, Profile, Terms, features, padded
from .record import FILE, Record

KNOTS = (0, 64, 128, 256, 512, 1024, 2048, 4096)
FOLDS = 5
OUTLIER = 5.0  # median absolute deviations of the relative error beyond which a step was disturbed
FEWEST = 20  # steps of one kind that a fit of its own takes
STEPS, DECISIONS = "steps.parquet", "decisions.parquet"
Sample = tuple[Sequence[int], Sequence[int], float]  # starts and lengths of a step's chunks, its seconds
Fits = dict[str, tuple[Terms, dict[str, float]]]  # kind of steps -> terms, and their error


# ---- of a recorded run -----------------------------------------------------------------------------------


def profile_of_run(directory: Path) -> Profile:
    """The clock of a recorded run. Raises HeadwayError for a run that does not hold its steps, or too few of
    them."""
    return _fitted_once(
        directory.resolve(), (directory / FILE).stat().st_mtime_ns if (directory / FILE).exists() else 0
    )


@lru_cache(maxsize=8)
def _fitted_once(directory: Path, changed: int) -> Profile:
    """A sweep asks for the same run again and again."""
    meta = Record.load(directory, "executor.profile").meta
    if meta["model"] is None or meta["facts"] is None:
        raise ConfigError(
            f"executor.profile={directory}: does not say the shape of its model, or its composition"
        )
    return profile_of_fits(
        fits_of(samples_of(directory), directory),
        hardware=meta["facts"]["hardware.name"],
        shape=meta["model"],
        tp=meta["facts"]["parallel.tp"],
        pp=meta["facts"]["parallel.pp"],
        made={"device": f"the run {directory}"},
    )


def profile_of_served(path: Path, max_num_batched_tokens: int, **about: Any) -> Profile:
    """The clock of the server that `vllm bench serve` asked. Raises ConfigError for a file without its
    requests, or with too few of them."""
    changed = path.stat().st_mtime_ns if path.exists() else 0
    fits = _served_once(path.resolve(), changed, max_num_batched_tokens)
    return profile_of_fits(fits, made={"device": f"the server of {path}"}, **about)


@lru_cache(maxsize=8)
def _served_once(path: Path, changed: int, max_num_batched_tokens: int) -> Fits:
    return fits_of(served_steps(read_served(path, "executor.profile"), max_num_batched_tokens), path)


def fits_of(samples: Sequence[Sample], path: Path) -> Fits:
    """A kind of steps of which there are too few to fit shares the terms of all steps. Raises ConfigError,
    which names where they are from, for too few of both."""
    if len(samples) < FEWEST:
        raise ConfigError(
            f"executor.profile={path}: {len(samples)} steps are too few to fit a clock to: expected at "
            f"least {FEWEST}"
        )
    return {
        kind: fitted(own if len(own) >= FEWEST else samples, [], as_long_in_all)
        for kind, own in by_kind(samples).items()
    }


def by_kind(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """decode: steps of decodes alone; mixed: steps with prompts."""
    found: dict[str, list[Sample]] = {kind: [] for kind in KINDS}
    for sample in samples:
        found["decode" if sum(sample[1]) == len(sample[1]) else "mixed"].append(sample)
    return found


def profile_of_fits(fits: Fits, **about: Any) -> Profile:
    """`about`: the fields of Profile that no fit gives."""
    terms: dict[str, Any] = {kind: terms for kind, (terms, _) in fits.items()}
    return Profile(**terms, error={kind: error for kind, (_, error) in fits.items()}, **about)


def samples_of(directory: Path) -> list[Sample]:
    """The steps of a recorded run. While requests run, a step takes from the end of the one before it to its
    own: what the host needs in between is part of it, and what overlaps is counted once. Raises ConfigError
    for a run without these files."""
    import pyarrow.parquet as pq

    try:
        steps = pq.read_table(directory / STEPS, columns=["step", "start", "end", "num_running"]).to_pydict()
        chunks = pq.read_table(directory / DECISIONS, columns=["step", "starts", "lengths"]).to_pydict()
    except (OSError, ValueError, KeyError) as error:
        files = f"results.files must hold {STEPS} and {DECISIONS}"
        raise ConfigError(
            f"executor.profile={directory}: does not hold its steps ({error}): {files}"
        ) from error
    if steps["step"] != chunks["step"]:
        raise ConfigError(f"executor.profile={directory}: {STEPS} and {DECISIONS} are not of one run")
    found: list[Sample] = []
    last, busy = 0.0, False
    columns = (steps["start"], steps["end"], steps["num_running"], chunks["starts"], chunks["lengths"])
    for start, end, running, starts, lengths in zip(*columns, strict=True):
        seconds = end - (last if busy else start)
        if lengths and seconds > 0:
            found.append((starts, lengths, seconds))
        last, busy = end, running > 0
    return found


# ---- the fit ---------------------------------------------------------------------------------------------


def nonnegative(table: Any, seconds: Any) -> Any:
    """Least squares of the relative error with no coefficient below 0, by active sets (Lawson and Hanson,
    1974): coefficients are let in one by one, steepest first, and those that would fall below 0 are put out
    again."""
    import numpy as np

    scale = np.abs(table).max(axis=0)
    scale[scale == 0] = 1.0
    weighted = table / scale / seconds[:, None]
    gram, aim = weighted.T @ weighted, weighted.sum(axis=0)
    found, free = np.zeros(len(aim)), np.zeros(len(aim), bool)
    tolerance = 1e-10 * max(1.0, float(np.abs(aim).max()))
    for _ in range(10 * len(aim)):
        slope = np.where(free, -np.inf, aim - gram @ found)
        if slope.max() <= tolerance:
            break
        free[slope.argmax()] = True
        while free.any():
            aimed = np.zeros(len(aim))
            aimed[free] = np.linalg.lstsq(gram[np.ix_(free, free)], aim[free], rcond=None)[0]
            below = free & (aimed <= 0)
            if not below.any():
                found = aimed
                break
            step = (found[below] / np.maximum(found[below] - aimed[below], 1e-300)).min()
            found = found + step * (aimed - found)
            free &= found > 1e-14
            found[~free] = 0.0
    return found / scale


def as_long_in_all(table: Any, seconds: Any) -> Any:
    """`nonnegative`, made longer by one factor so that all steps together take what they took: the least
    relative error alone is that of a clock which runs fast where steps vary by chance, since being short
    costs less than being long."""
    found = nonnegative(table, seconds)
    predicted = float((table @ found).sum())
    return found * (float(seconds.sum()) / predicted) if predicted > 0 else found


def fitted(
    samples: Sequence[Sample], sizes: Sequence[int], solve: Callable[[Any, Any], Any] = nonnegative
) -> tuple[Terms, dict[str, float]]:
    """The terms of one kind of step, and their relative error on steps that each fit has not seen. `solve`
    answers the coefficients of a table of units and its seconds."""
    import numpy as np

    knots = knots_of(samples)
    table, seconds = rows(samples, sizes, knots), np.array([s for _, _, s in samples])
    kept = undisturbed(table, seconds)
    table, seconds = table[kept], seconds[kept]
    fold = np.random.default_rng(0).permutation(len(seconds)) % FOLDS
    off = np.empty(len(seconds))
    for number in range(FOLDS):
        unseen = fold == number
        coefficients = solve(table[~unseen], seconds[~unseen])
        off[unseen] = table[unseen] @ coefficients / seconds[unseen] - 1
    floor, *rest = solve(table, seconds).tolist()
    slopes, others = rest[: len(knots)], rest[len(knots) :]
    terms = Terms(floor, knots, slopes, **dict(zip(TERMS, others, strict=True)), sizes=list(sizes))
    error = {
        "mean": float(off.mean()),
        "p50": float(np.median(np.abs(off))),
        "p90": float(np.quantile(np.abs(off), 0.9)),
        "steps": len(off),
        "disturbed": int((~kept).sum()),
    }
    return terms, {name: round(value, 5) for name, value in error.items()}


def knots_of(samples: Sequence[Sample]) -> list[int]:
    """Knots with at least a few steps above them."""
    tokens = sorted(sum(lengths) for _, lengths, _ in samples)
    return [knot for knot in KNOTS if not knot or len(tokens) > 8 and knot < tokens[-8]]


def rows(samples: Sequence[Sample], sizes: Sequence[int], knots: Sequence[int]) -> Any:
    """A row per step: 1, tokens above each knot, and the units of TERMS."""
    import numpy as np

    table = []
    for starts, lengths, _ in samples:
        tokens, *units = features(starts, lengths)
        size = padded(int(tokens), sizes)
        table.append([1.0, *(max(0.0, size - knot) for knot in knots), *units])
    return np.array(table)


def undisturbed(table: Any, seconds: Any) -> Any:
    """Which steps nothing else on the machine stretched, by a first fit."""
    import numpy as np

    off = table @ nonnegative(table, seconds) / seconds - 1
    middle = np.median(off)
    spread = max(float(np.median(np.abs(off - middle))), 0.01)
    return np.abs(off - middle) <= OUTLIER * spread
