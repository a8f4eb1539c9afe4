"""The roofline: seconds of a step from the model's shape, the hardware and the chunks, for one rank of tp x
pp.

For a step of chunks (s_i, n_i), which compute n_i tokens after s_i cached ones, with T = sum n_i tokens and R
chunks:

    linear    = max(weights / bandwidth,  (T * linear FLOPs + R * head FLOPs) / FLOP rate)  / (tp pp)
    attention = max((sum (s_i + n_i) + T) * KV bytes per token and rank / bandwidth,   keys and values
                    pairs * attention FLOPs / (tp pp) / FLOP rate)     pairs = sum n_i s_i + n_i (n_i + 1) / 2
    stage     = linear + attention + layers / pp * layer overhead
    tp > 1:  + 2 all-reduces per layer of T * hidden elements; a ring moves 2 (tp - 1) / tp of them over the
             link, plus its latency
    pp > 1:  a plan passes pp equal stages, with a send of T * hidden elements between two of them
    step      = overhead + pp * stage + (pp - 1) * send

Bandwidth and FLOP rate are what kernels reach: the peak times a fraction. Matrix products and attention run
one after the other, so bytes of the one never hide behind FLOPs of the other. The head is charged once a
chunk, as if every chunk sampled. Weights count once, embeddings included only where they are also the output
head. `experiments/sim_error.py` says how far off this is.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from operator import mul
from typing import Any

from headway import ConfigError, Hardware, ModelShape

from .profile import Profile
from .profile import restored as restored_profile

GIB = 1 << 30
# starts and lengths of its chunks, and what it took in seconds
Step = tuple[Sequence[int], Sequence[int], float]


def default_token_budget(shape: ModelShape, hardware: Hardware, tp: int = 1) -> int:
    """Tokens of a step that suit a card: 8 ridges of its roofline, rounded up to a power of two, for each of
    the ranks that share a step's arithmetic, whose steps take as long then as one card's. 2,048 on an H100 or
    H200 in bf16.

    One weight is read once per step and costs 2 FLOPs per token, so products take as long as reading their
    weights until a step holds

        ridge = (peak_flops * flops_fraction) / (memory_bandwidth * bandwidth_fraction) * bytes per weight / 2

    tokens: 214 on an H100 in bf16. A step of 8 ridges spends 8 times as long on arithmetic, and so at most an
    eighth of it is the reading that a step of decodes alone would cost as well; more tokens gain less than
    that eighth and make every decode beside them later. peak_flops is bf16's, so that a float32 model, whose
    products are slower, gets more than 8 of its ridges."""
    flops, bandwidth = (
        hardware.peak_flops * hardware.flops_fraction,
        hardware.memory_bandwidth * hardware.bandwidth_fraction,
    )
    ridge = flops / bandwidth * shape.dtype_bytes / 2
    return tp * int(2 ** math.ceil(math.log2(max(1.0, 8 * ridge))))


class Roofline:
    """A `CostModel` without parameters of its own: everything follows from shape, hardware, tp and pp."""

    def __init__(self, shape: ModelShape, hardware: Hardware, tp: int = 1, pp: int = 1) -> None:
        for name, value in (("tp", tp), ("pp", pp)):
            if value < 1:
                raise ConfigError(f"parallel.{name}={value}: expected at least 1")
        if shape.num_attention_heads % tp or (
            shape.num_key_value_heads % tp and tp % shape.num_key_value_heads
        ):
            raise ConfigError(
                f"parallel.tp={tp} divides neither {shape.num_attention_heads} attention heads nor "
                f"{shape.num_key_value_heads} KV heads evenly"
            )
        if pp > shape.num_hidden_layers:
            raise ConfigError(f"parallel.pp={pp}: the model has only {shape.num_hidden_layers} layers")
        self.shape, self.hardware, self.tp, self.pp = shape, hardware, tp, pp
        ranks = tp * pp
        # KV heads are replicated when there are fewer of them than ranks.
        kv_share = max(1, shape.num_key_value_heads // tp) / shape.num_key_value_heads
        self.kv_bytes_per_token = shape.kv_bytes_per_token * kv_share / pp  # of one rank
        self.weight_bytes = shape.weight_bytes / ranks  # of one rank
        read = shape.weight_bytes - (
            0 if shape.tie_word_embeddings else shape.embedding_parameters * shape.dtype_bytes
        )
        bandwidth = hardware.memory_bandwidth * hardware.bandwidth_fraction
        flops = hardware.peak_flops * hardware.flops_fraction
        link = hardware.link_bandwidth * hardware.link_fraction
        # Seconds a unit, so that a step is a handful of products.
        self._weights = read / ranks / bandwidth
        self._kv = self.kv_bytes_per_token / bandwidth  # a token of KV read or written
        self._linear = shape.linear_flops_per_token / ranks / flops  # a token
        self._pair = shape.attention_flops_per_pair / ranks / flops  # a query-key pair
        self._head = shape.head_flops / ranks / flops  # a sampled token
        self._layers = shape.num_hidden_layers / pp * hardware.layer_overhead
        row = shape.hidden_size * shape.dtype_bytes  # bytes of one token's activation
        reduces = 2 * shape.num_hidden_layers / pp if tp > 1 else 0  # of one stage
        self._reduce_latency = reduces * hardware.link_latency
        self._reduce = reduces * 2 * (tp - 1) / tp * row / link  # a token
        self._send_latency = hardware.link_latency if pp > 1 else 0.0
        self._send = row / link if pp > 1 else 0.0  # a token

    def coefficients(self) -> tuple[float, ...]:
        """What `stage_time` multiplies with, for an engine that works it out itself."""
        return (
            self._weights, self._linear, self._head, self._kv, self._pair, self._layers,
            self._reduce_latency, self._reduce, self._send_latency, self._send,
        )  # fmt: skip

    def stage_time(self, starts: Sequence[int], lengths: Sequence[int]) -> tuple[float, float]:
        """Seconds of one pipeline stage, and of the send that follows it. The per-step overhead is not in
        it."""
        tokens, cached = sum(lengths), sum(starts)
        if tokens == len(lengths):  # decodes only
            pairs = cached + tokens
        else:
            pairs = sum(map(mul, starts, lengths)) + (sum(map(mul, lengths, lengths)) + tokens) // 2
        linear = max(self._weights, tokens * self._linear + len(lengths) * self._head)
        attention = max((cached + 2 * tokens) * self._kv, pairs * self._pair)
        reduces = self._reduce_latency + tokens * self._reduce
        return linear + attention + self._layers + reduces, self._send_latency + tokens * self._send

    def step_time(self, starts: Sequence[int], lengths: Sequence[int]) -> float:
        """Seconds from the launch of a step with these chunks to its tokens, on idle hardware."""
        stage, send = self.stage_time(starts, lengths)
        return self.hardware.step_overhead + self.pp * stage + (self.pp - 1) * send

    @property
    def stated_error(self) -> float | None:
        """Relative error of a step's time, where it was measured on this card."""
        return self.hardware.step_error

    def __str__(self) -> str:
        return f"roofline of {self.hardware.name}, tp={self.tp} pp={self.pp}"

    def kv_capacity(self, block_size: int, memory_utilization: float, activation_gb: float) -> int:
        """Blocks that fit on each rank: (memory * utilization - weights - activations) / bytes per block.
        Raises ConfigError when none does."""
        budget = self.hardware.memory_bytes * memory_utilization
        left = budget - self.weight_bytes - activation_gb * GIB
        blocks = int(left // (block_size * self.kv_bytes_per_token))
        if blocks < 1:
            raise ConfigError(
                f"{self.weight_bytes / GIB:.1f} GiB of weights and executor.activation_gb={activation_gb} "
                "for each rank leave no room "
                f"for KV in hardware.memory_gb={self.hardware.memory_gb} x "
                f"executor.memory_utilization={memory_utilization} of "
                f"{self.hardware.name}: raise parallel.tp or parallel.pp, or choose a smaller model or "
                "larger hardware"
            )
        return blocks


class Fitted:
    """A `CostModel` of an engine that runs its steps: a roofline, times how much longer the last steps took
    than it says.

    Steps of decodes and steps with prompts have a factor each, the median of the last STEPS, so that one slow
    step counts for nothing; it is 1 until a first step has been seen. The same steps in the same order give
    the same predictions, and so a replay takes the decisions of its record."""

    STEPS = 15

    def __init__(self, roofline: Roofline) -> None:
        self.roofline = roofline
        # (starts, lengths, seconds) of the last steps: worked out when somebody asks, since most runs ask for
        # nothing.
        self._seen: dict[bool, deque[Step]] = {decodes: deque(maxlen=self.STEPS) for decodes in (True, False)}
        self._factors: dict[bool, float] = {}  # of the kinds that were asked for since their last step

    def step_time(self, starts: Sequence[int], lengths: Sequence[int]) -> float:
        return self.roofline.step_time(starts, lengths) * self._factor(_only_decodes(lengths))

    def observe(self, starts: Sequence[int], lengths: Sequence[int], seconds: float) -> None:
        """A step with these chunks took so long."""
        kind = _only_decodes(lengths)
        self._seen[kind].append((starts, lengths, seconds))
        self._factors.pop(kind, None)

    def _factor(self, kind: bool) -> float:
        if kind not in self._factors:
            found = [
                seconds / self.roofline.step_time(starts, lengths)
                for starts, lengths, seconds in self._seen[kind]
            ]
            self._factors[kind] = statistics.median(found) if found else 1.0
        return self._factors[kind]

    def __str__(self) -> str:
        words = {True: "of decodes", False: "with prompts"}
        found = [
            f"x {self._factor(kind):.2f} in steps {words[kind]}" for kind in (True, False) if self._seen[kind]
        ]
        return ", ".join([str(self.roofline), *found])


def _only_decodes(lengths: Sequence[int]) -> bool:
    return sum(lengths) == len(lengths)


def stored(cost: object) -> dict[str, Any] | None:
    """A cost model as JSON has it; None for one of another kind."""
    if isinstance(cost, Profile):
        return {"profile": asdict(cost)}
    roofline = cost.roofline if isinstance(cost, Fitted) else cost
    if not isinstance(roofline, Roofline):
        return None
    layout = {"hardware": asdict(roofline.hardware), "tp": roofline.tp, "pp": roofline.pp}
    return layout | {"fitted": isinstance(cost, Fitted)}


def restored(shape: ModelShape, kept: dict[str, Any]) -> Roofline | Fitted | Profile:
    """The cost model that was stored, before its first step. Raises KeyError, TypeError and ValueError for
    what is none."""
    if "profile" in kept:
        return restored_profile(kept["profile"])
    roofline = Roofline(shape, Hardware(**kept["hardware"]), kept["tp"], kept["pp"])
    return Fitted(roofline) if kept["fitted"] else roofline
