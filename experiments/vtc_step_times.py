"""What a step cost the authors of VTC, from the logs of their artifact: experiments/vtc_a10g.yaml.

    git clone https://github.com/Ying1123/VTC-artifact
    python experiments/vtc_step_times.py VTC-artifact/fair_bench/{VTC,WVTC}/all_results_overload*.jsonl \\
        VTC-artifact/fair_bench/VTC/all_results_{on_off_overload,poisson_short_long,poisson_short_long_2}.jsonl

Their server computes prompts in steps of their own, so an answer of n tokens takes n - 1 steps of decodes and
the steps of all prompts that start meanwhile. The logs have when each request got its first and its last
token, hence who ran beside it, with how many tokens of context, and which prompts started. Least squares over
all answers' times, each weighed by its own length, give seconds per step of decodes, per running request, per
token of context, per prompt token, and per step of prompts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from headway import ModelConfig
from plugins.executors.profile import Profile, Terms, write

HERE = Path(__file__).resolve().parent
GRID = 0.25  # seconds between two looks at who runs
TOGETHER = 0.03  # seconds within which first tokens are of one step


@dataclass(frozen=True)
class Answers:
    """One run's requests: when the first and the last token came, in seconds, and their lengths."""

    first: np.ndarray
    last: np.ndarray
    prompt: np.ndarray
    output: np.ndarray


def answers(log: Path) -> Answers:
    found = json.loads(log.read_text().splitlines()[0])["result"]["responses"]
    return Answers(
        *np.array(
            sorted(
                (
                    r["req_time"] + r["first_token_latency"],
                    r["req_time"] + r["request_latency"],
                    r["prompt_len"],
                    r["output_len"],
                )
                for r in found
            )
        ).T
    )


def units(a: Answers) -> np.ndarray:
    """Of each answer: steps of decodes; those times the requests and times the context beside it, on average;
    prompt tokens and steps of prompts in its time."""
    at = np.arange(0.0, a.last.max() + GRID, GRID)[:, None]
    runs = (a.first <= at) & (at < a.last)
    grown = a.output * np.clip((at - a.first) / (a.last - a.first), 0.0, 1.0)
    context = np.where(runs, a.prompt + grown, 0.0)
    begin = np.searchsorted(at[:, 0], a.first)
    end = np.maximum(np.searchsorted(at[:, 0], a.last), begin + 1)

    def mean(amounts: np.ndarray) -> np.ndarray:
        total = np.concatenate(([0.0], np.cumsum(amounts)))
        return (total[end] - total[begin]) / (end - begin)

    starts, ends = np.searchsorted(a.first, a.first + TOGETHER), np.searchsorted(a.first, a.last - TOGETHER)
    ends = np.maximum(ends, starts)
    tokens = np.concatenate(([0.0], np.cumsum(a.prompt)))
    steps = np.concatenate(([0.0], np.cumsum(np.diff(a.first, prepend=-1.0) > TOGETHER)))
    decodes = a.output - 1
    each = (decodes * mean(runs.sum(axis=1)), decodes * mean(context.sum(axis=1)))
    return np.stack([decodes, *each, tokens[ends] - tokens[starts], steps[ends] - steps[starts]], axis=1)


def fitted(runs: Sequence[Answers]) -> tuple[dict[str, Terms], dict[str, float]]:
    """Terms of steps of decodes and of prompts, and how far off answers are."""
    taken = np.concatenate([a.last - a.first for a in runs])
    matrix = np.concatenate([units(a) for a in runs]) / taken[:, None]
    floor, sequence, context, token, prompts = np.linalg.lstsq(matrix, np.ones(len(taken)), rcond=None)[0]
    off = np.abs(matrix @ (floor, sequence, context, token, prompts) - 1)
    nothing: dict[str, Any] = {"prompt_context": 0.0, "pair": 0.0}
    terms = {
        "decode": Terms(
            float(floor), [0], [0.0], sequence=float(sequence), decode_context=float(context), **nothing
        ),
        "mixed": Terms(float(prompts), [0], [float(token)], sequence=0.0, decode_context=0.0, **nothing),
    }
    middle, most = np.quantile(off, (0.5, 0.9))
    return terms, {"p50": float(middle), "p90": float(most), "mean": float(off.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "vtc_a10g.yaml")
    args = parser.parse_args()
    terms, error = fitted([answers(log) for log in args.logs])
    model = yaml.safe_load((HERE.parent / "conf" / "model" / "llama_2_7b.yaml").read_text())
    profile = Profile(
        hardware="a10g",
        shape=asdict(ModelConfig(**model).shape()),
        tp=1,
        pp=1,
        **terms,
        error={"whole answers'": error},
        made={"device": "NVIDIA A10G under S-LoRA", "from": "the logs of VTC's artifact"},
    )
    write(profile, args.out)
    print(profile)


if __name__ == "__main__":
    main()
