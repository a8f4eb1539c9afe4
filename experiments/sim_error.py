"""How far the simulator's step times are from measured ones: the cost model against decode steps and prompts
of the real engine.

    python experiments/sim_error.py

Measured: one H200, or four of one host, on 2026-11-21; Qwen3 shapes, random weights, bf16, CUDA graphs
(docs/performance.md and docs/parallel.md). The constants of conf/hardware/h200.yaml were chosen by
qwen3_0_6b's decode steps, among them those here, and qwen3_8b's prompts; for the other rows they predict.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from headway import Hardware, ModelConfig  # noqa: E402
from plugins.executors.cost import Roofline  # noqa: E402


@dataclass(frozen=True)
class Decode:
    """A step in which `running` requests decode, with so many tokens of context in the mean."""

    model: str
    tp: int
    running: int
    context: int
    measured: float  # seconds

    def __str__(self) -> str:
        return f"{self.model} tp={self.tp} decode, {self.running} x {self.context}"

    def predicted(self, cost: Roofline) -> float:
        return cost.step_time([self.context - 1] * self.running, [1] * self.running)


@dataclass(frozen=True)
class Prompts:
    """Steps of `tokens` tokens, prompts of `length`."""

    model: str
    tp: int
    tokens: int
    length: int
    measured: float  # seconds per step

    def __str__(self) -> str:
        return f"{self.model} tp={self.tp} prompts, {self.tokens // self.length} x {self.length}"

    def predicted(self, cost: Roofline) -> float:
        return cost.step_time(
            [0] * (self.tokens // self.length), [self.length] * (self.tokens // self.length)
        )


CASES: list[Decode | Prompts] = [
    Decode("qwen3_0_6b", 1, 256, 956, measured=7.753e-3),
    Decode("qwen3_0_6b", 1, 128, 867, measured=4.078e-3),
    Decode("qwen3_0_6b", 1, 64, 856, measured=2.586e-3),
    Decode("qwen3_0_6b", 1, 16, 1014, measured=1.740e-3),
    Decode("qwen3_0_6b", 1, 1, 689, measured=0.930e-3),
    Decode("qwen3_8b", 1, 192, 963, measured=12.79e-3),
    Decode("qwen3_8b", 1, 64, 873, measured=7.13e-3),
    Decode("qwen3_8b", 1, 1, 327, measured=4.58e-3),
    Decode("qwen3_32b", 1, 256, 300, measured=34.96e-3),
    Decode("qwen3_32b", 1, 640, 300, measured=82.1e-3),
    Decode("qwen3_32b", 4, 1024, 300, measured=41.5e-3),
    Prompts("qwen3_32b", 1, 8192, 1024, measured=8192 / 9685),
    Prompts("qwen3_32b", 4, 8192, 1024, measured=237.6e-3),
]


def main() -> None:
    conf = ROOT / "conf"
    hardware = Hardware(**OmegaConf.load(conf / "hardware" / "h200.yaml"))
    print(f"{'':44} measured ms  predicted ms   error")
    for case in CASES:
        shape = ModelConfig(**OmegaConf.load(conf / "model" / f"{case.model}.yaml")).shape()
        predicted = case.predicted(Roofline(shape, hardware, tp=case.tp))
        print(
            f"{case!s:44} {case.measured * 1e3:11.2f} {predicted * 1e3:13.2f} "
            f"{predicted / case.measured - 1:+7.0%}"
        )


if __name__ == "__main__":
    main()
