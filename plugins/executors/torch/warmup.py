"""What must not happen while the clock runs: kernels are compiled and graphs captured before the first
request, and what comes later is counted."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from .batch import FILTERED, GREEDY, RANDOM

if TYPE_CHECKING:
    from .runner import ModelRunner


class Preparations:
    """Counts this process's compilations by Triton, those read from its cache on disk too, and captures of
    CUDA graphs."""

    def __init__(self) -> None:
        self.count = 0

    def listen(self) -> None:
        """From here on Triton tells of what it compiles."""
        if importlib.util.find_spec("triton") is not None:
            from triton import knobs

            knobs.compilation.listener = self._compiled

    def _compiled(self, *_: Any, **__: Any) -> None:
        self.count += 1

    def captured(self) -> None:
        self.count += 1


PREPARATIONS = Preparations()


@torch.inference_mode()
def warm_up(runner: ModelRunner, seqs: list[int], tokens: list[int]) -> None:
    """Runs an empty step of each size: decodes of `seqs`, then prompts of `tokens`, with every kind of
    sampling. What is compiled at a first launch is compiled here. Changes no request's state: its rows all
    belong to no request."""
    runner.tell_nothing_new()
    runner.batch_rows.fill_(runner.max_num_seqs)
    for count in seqs:
        for sampling in (GREEDY, RANDOM, FILTERED):
            runner.decode(count, runner.max_model_len, sampling)
    for total in tokens:
        batch = torch.zeros(4 + 2 * total, dtype=torch.int64, device=runner.device)
        batch[0] = runner.max_num_seqs  # one sequence, of no token
        hidden, rows, ends, last = runner.mixed_hidden(1, total, batch, total, runner.max_model_len)
        for sampling in (GREEDY, RANDOM, FILTERED):
            runner.draw(hidden[last], rows, ends, sampling)
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)
