"""Steps as CUDA graphs, replayed with one call: the host launches a step in the time of a few kernels,
whatever it holds.

Graphs share one memory pool: the largest is captured first, so that smaller ones fit into what it took.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .batch import FILTERED, GREEDY, NO_LOGPROBS, RANDOM
from .runner import Sampled
from .warmup import PREPARATIONS

if TYPE_CHECKING:
    from .batch import StepInput
    from .runner import ModelRunner

T = TypeVar("T")
Size = tuple[int, int]  # sequences, one of padding among them; tokens

LAUNCH_PER_LAYER = 0.5e-3  # seconds that a host takes to launch one layer, kernel by kernel
FLOPS = 6e14  # per second, of a GPU that computes long steps
# up to so many tokens, a step of so few sequences has a graph that pads to no more of them
SHORT, FEW_SEQS = 512, 64
# a step that keeps the GPU busy for so many times its launch needs no graph: its launch hides behind the step
# before
HIDDEN = 3


def batch_sizes(largest: int) -> list[int]:
    """Sizes that cover every batch up to `largest`, largest first, at most an eighth of padding from 32
    on."""
    sizes = [
        1,
        2,
        4,
        *range(8, 33, 4),
        *range(40, 129, 8),
        *range(144, 257, 16),
        *range(288, 513, 32),
        *range(576, largest + 64, 64),
    ]
    return sorted({min(size, largest) for size in sizes}, reverse=True)


def token_sizes(largest: int) -> list[int]:
    """Numbers of tokens that cover every mixed step up to `largest`, smallest first, at most an eighth of
    padding from 64 on."""
    sizes, step = list(range(16, 65, 16)), 8
    while sizes[-1] < largest:
        step = 2 * step if sizes[-1] >= 16 * step else step
        sizes.append(sizes[-1] + step)
    return sorted({min(size, largest) for size in sizes})


def longest_mixed(parameters: int, at_most: int) -> int:
    """Tokens up to which a step is worth a graph. parameters: of a layer, on this device."""
    return max(1, min(at_most, int(HIDDEN * LAUNCH_PER_LAYER * FLOPS / (2 * parameters))))


def capture(function: Callable[[], T], pool: Any) -> tuple[torch.cuda.CUDAGraph, T]:
    """The function as a graph, and the tensors that each replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # warm-up: lazy initialisation and compilation must not happen inside the capture
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    PREPARATIONS.captured()
    # Other threads of a parallel run ask about events at any time, which must not end a capture here.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = function()
    return graph, result


class DecodeGraphs:
    """Graphs of `runner.decode`, sampling included: one per batch size and kind of sampling.

    A batch is padded to the next size with the row that belongs to nobody. Logprobs run outside of graphs.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._sizes = sorted(batch_sizes(runner.max_num_seqs))
        # by batch size and kind of sampling
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Sampled]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        with _no_garbage():
            for sampling in (GREEDY, RANDOM, FILTERED):
                for size in reversed(self._sizes):
                    self._capture(size, sampling)

    def _capture(self, size: int, sampling: int) -> None:
        runner = self._runner
        runner.batch_rows.fill_(runner.max_num_seqs)
        graph, sampled = capture(lambda: runner.decode(size, runner.max_model_len, sampling), self._pool)
        smaller = max((s for s in self._sizes if s < size), default=0)
        for num_seqs in range(smaller + 1, size + 1):
            self._graphs[num_seqs, sampling] = graph, Sampled(sampled.tokens[:num_seqs], None)

    def decode(self, num_seqs: int, max_context: int, sampling: int, logprobs: int) -> Sampled:
        """Same contract and same result as `ModelRunner.decode`."""
        runner = self._runner
        if logprobs != NO_LOGPROBS:
            return runner.decode(num_seqs, max_context, sampling, logprobs)
        graph, sampled = self._graphs[num_seqs, sampling]
        graph.replay()
        return sampled


class MixedGraphs:
    """Graphs of a step with prompts, two per step: of `runner.mixed_hidden`, one per number of tokens and of
    sequences, and of `runner.draw`, one per number of sequences that sample and kind of sampling. Logprobs
    run outside of graphs.

    Between the two stand `_hidden`, `_rows` and `_ends`, of every sequence.
    """

    def __init__(self, runner: ModelRunner, longest: int) -> None:
        """longest: tokens of the largest step that gets a graph."""
        self._runner = runner
        most = runner.max_num_seqs
        self.tokens = token_sizes(longest)
        self._few, self._most = min(FEW_SEQS, most) + 1, most + 1
        self._samples = sorted(batch_sizes(most))
        self._models: dict[Size, torch.cuda.CUDAGraph] = {}
        # by samples, kind of sampling
        self._draws: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        integers: dict[str, Any] = {"dtype": torch.int64, "device": runner.device}
        # The sequences that sample, then the batch, as `StepInput.padded` lays it out.
        self._inputs = torch.zeros(most + 3 * (most + 1) + 1 + 2 * longest, **integers)
        self._chosen, self._batch = self._inputs[:most], self._inputs[most:]
        self._rows = torch.full((most + 1,), most, **integers)
        self._ends = torch.zeros(most + 1, **integers)
        shape = runner.model.spec.shape
        self._hidden = torch.zeros(
            (most + 1, shape.hidden_size), dtype=getattr(torch, shape.dtype), device=runner.device
        )
        self._pool = torch.cuda.graph_pool_handle()
        with _no_garbage(), torch.inference_mode():
            for tokens in reversed(self.tokens):
                for seqs in sorted({self._most, self._few if tokens <= SHORT else self._most}, reverse=True):
                    self._capture_model(seqs, tokens)
            for sampling in (GREEDY, RANDOM, FILTERED):
                for count in reversed(self._samples):
                    graph, sampled = capture(partial(self._draw, count, sampling, NO_LOGPROBS), self._pool)
                    self._draws[count, sampling] = graph, sampled.tokens

    def _capture_model(self, seqs: int, tokens: int) -> None:
        runner, batch = self._runner, self._batch[: 3 * seqs + 1 + 2 * tokens]
        batch.zero_()  # an empty one
        batch[:seqs] = runner.max_num_seqs
        batch[-tokens:] = seqs - 1

        def run() -> None:
            hidden, rows, ends, last = runner.mixed_hidden(seqs, tokens, batch, tokens, runner.max_model_len)
            self._hidden[:seqs].copy_(hidden[last])
            self._rows[:seqs].copy_(rows)
            self._ends[:seqs].copy_(ends)

        self._models[seqs, tokens], _ = capture(run, self._pool)

    def _draw(self, count: int, sampling: int, logprobs: int) -> Sampled:
        chosen = self._chosen[:count]
        return self._runner.draw(
            self._hidden[chosen], self._rows[chosen], self._ends[chosen], sampling, logprobs
        )

    def size_of(self, step: StepInput) -> Size | None:
        """Of the graph that the step fits into; None where there is none."""
        at = bisect_left(self.tokens, step.num_tokens)
        if at == len(self.tokens):
            return None
        tokens = self.tokens[at]
        return self._few if step.num_seqs < self._few and tokens <= SHORT else self._most, tokens

    def replay(self, size: Size, inputs: Tensor, step: StepInput) -> Sampled:
        """What `ModelRunner` answers for the step, valid until the next replay."""
        self._inputs[: len(inputs)].copy_(inputs)
        self._models[size].replay()
        n = step.num_samples
        if not n or step.logprobs != NO_LOGPROBS:
            return self._draw(n, step.sampling, step.logprobs)
        graph, tokens = self._draws[self._samples[bisect_left(self._samples, n)], step.sampling]
        graph.replay()
        return Sampled(tokens[:n], None)


@contextmanager
def _no_garbage() -> Iterator[None]:
    """The collector does not run: were it to free another engine's graphs in the middle of a capture, the
    capture would fail."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
