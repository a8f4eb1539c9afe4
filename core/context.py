"""What a policy is told about its run, and what it may ask beside the view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .request import Request


@dataclass(frozen=True)
class Context:
    """What a policy may know about the run it is part of, handed to `setup`."""

    seed: int
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    roles: Mapping[str, Any]  # config node -> the object, of that node's class
    cost_model: CostModel | None = None
    model: Any = None  # core.compose.config.ModelShape, where the executor knows it
    truth: Truth | None = None  # only for roles that declare `sees_truth = True`
    # tokens of a step that suit the executor, for a scheduler that is given no number of its own
    token_budget: int = 512
    tokenizer: Any = None  # of the executor, for a workload of texts; None where it has none


class CostModel(Protocol):
    """Predicts the seconds of a step that holds these chunks; set by executors that have one."""

    def step_time(self, starts: Sequence[int], lengths: Sequence[int]) -> float:
        """Seconds of a step whose i-th chunk computes positions starts[i] to starts[i] + lengths[i] - 1 of a
        request."""


class Truth:
    """What no deployed policy knows. Reachable only through roles that declare `sees_truth = True`."""

    def __init__(self, hidden_ends: Mapping[int, int] | None = None) -> None:
        """`hidden_ends`: request index -> known tokens at which its emulated answer ends."""
        self._hidden_ends = {} if hidden_ends is None else hidden_ends
        self.future: list[Any] = []  # Arrivals, in order of time, where the workload knows them beforehand

    def output_len(self, request: Request) -> int:
        """Tokens it will have generated when it ends, unless the model ends it first."""
        longest = request.max_num_tokens
        return min(longest, self._hidden_ends.get(request.index, longest)) - request.num_prompt_tokens
