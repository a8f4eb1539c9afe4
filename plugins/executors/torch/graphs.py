"""The whole decode step, sampling included, as CUDA graphs: one a batch size and kind of sampling, replayed with one call."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .batch import FILTERED, GREEDY, NO_LOGPROBS, RANDOM
from .runner import Sampled

if TYPE_CHECKING:
    from .runner import ModelRunner


def batch_sizes(largest: int) -> list[int]:
    """Sizes that cover every batch up to `largest`, largest first, at most an eighth of padding from 32 on."""
    sizes = [1, 2, 4, *range(8, 33, 4), *range(40, 129, 8), *range(144, 257, 16), *range(288, 513, 32), *range(576, largest + 64, 64)]
    return sorted({min(size, largest) for size in sizes}, reverse=True)


class DecodeGraphs:
    """Graphs of `runner.decode`. They share one memory pool: largest first, so that smaller ones fit into what it took.

    A batch is padded to the next size with the row that belongs to nobody. Logprobs run outside of graphs.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._sizes = sorted(batch_sizes(runner.max_num_seqs))
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Sampled]] = {}  # by batch size and kind of sampling
        self._pool = torch.cuda.graph_pool_handle()
        with _no_garbage():
            for sampling in (GREEDY, RANDOM, FILTERED):
                for size in reversed(self._sizes):
                    self._capture(size, sampling)

    def _capture(self, size: int, sampling: int) -> None:
        runner = self._runner
        runner.batch_rows.fill_(runner.max_num_seqs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm-up: lazy initialisation and compilation must not happen inside the capture
            runner.decode(size, runner.max_model_len, sampling)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads of a parallel run ask about events at any time, which must not end a capture here.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            tokens = runner.decode(size, runner.max_model_len, sampling).tokens
        smaller = max((s for s in self._sizes if s < size), default=0)
        for num_seqs in range(smaller + 1, size + 1):
            self._graphs[num_seqs, sampling] = graph, Sampled(tokens[:num_seqs], None)

    def decode(self, num_seqs: int, max_context: int, sampling: int, logprobs: int) -> Sampled:
        """Same contract and same result as `ModelRunner.decode`."""
        runner = self._runner
        if logprobs != NO_LOGPROBS:
            return runner.decode(num_seqs, max_context, sampling, logprobs)
        graph, sampled = self._graphs[num_seqs, sampling]
        graph.replay()
        return sampled


@contextmanager
def _no_garbage() -> Iterator[None]:
    """The collector does not run: were it to free another engine's graphs in the middle of a capture, the capture would fail."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
