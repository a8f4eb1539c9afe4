"""A case: a small workload and the limits it runs under, as plain data that can be printed, sent to another
process and shrunk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any

from ..inputs import SLO, Arrival, SamplingParams, Tags
from .oracle import sampled_token

VOCAB = 5
CONTEXT = 64  # tokens
STEP_SECONDS = 0.01


@dataclass(frozen=True)
class Turn:
    """A follow-up in a session: its prompt is the whole conversation so far, and these tokens."""

    think: float  # seconds after the answer
    tokens: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True)
class Ask:
    """One request, and the turns that follow it."""

    id: str
    time: float
    prompt: tuple[int, ...]
    max_tokens: int
    output_len: int | None = None  # hidden; None: by max_tokens, or by the model's end of sequence
    client: str = ""
    category: str = ""
    priority: int = 0
    tool: str = ""
    salt: str = ""
    slo: tuple[float | None, float | None, float | None] = (None, None, None)
    turns: tuple[Turn, ...] = ()

    def arrival(self) -> Arrival:
        tags = Tags(self.client, self.id, 0, self.category, priority=self.priority, tool=self.tool)
        return Arrival(
            time=self.time,
            prompt_token_ids=list(self.prompt),
            sampling=SamplingParams(max_tokens=self.max_tokens),
            output_len=self.output_len,
            id=self.id,
            tags=tags,
            slo=SLO(*self.slo),
            cache_salt=self.salt,
        )

    def following(self, turn: int, conversation: list[int], now: float) -> Arrival | None:
        """Turn number `turn` (the first request is 0) after a conversation of so many tokens."""
        if turn > len(self.turns):
            return None
        next = self.turns[turn - 1]
        tags = Tags(self.client, self.id, turn, self.category, priority=self.priority, tool=self.tool)
        prompt, sampling = [*conversation, *next.tokens], SamplingParams(max_tokens=next.max_tokens)
        return Arrival(
            time=now + next.think,
            prompt_token_ids=prompt,
            sampling=sampling,
            output_len=None,
            id=f"{self.id}.{turn}",
            tags=tags,
            slo=SLO(*self.slo),
            cache_salt=self.salt,
        )


@dataclass(frozen=True)
class Case:
    """Everything that decides a run, apart from the policies a user named. `fill` names the others: role,
    name, parameters."""

    seed: int
    asks: tuple[Ask, ...]
    block_size: int = 2
    num_blocks: int = 16
    max_num_seqs: int = 4
    max_num_batched_tokens: int = 16
    max_inflight: int = 1
    placeholders: bool = True
    eos: bool = False
    token_seconds: float = 0.0
    stop_after: int | None = None  # Ctrl-C after so many turns of the loop
    fill: tuple[tuple[str, str, tuple[tuple[str, Any], ...]], ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(
            len(a.prompt) + a.max_tokens + sum(len(t.tokens) + t.max_tokens for t in a.turns)
            for a in self.asks
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        data = json.loads(text)
        asks = []
        for ask in data.pop("asks"):
            turns = tuple(Turn(t["think"], tuple(t["tokens"]), t["max_tokens"]) for t in ask.pop("turns"))
            asks.append(
                Ask(**{**ask, "prompt": tuple(ask["prompt"]), "slo": tuple(ask["slo"]), "turns": turns})
            )
        fill = tuple(
            (role, name, tuple((k, v) for k, v in parameters)) for role, name, parameters in data.pop("fill")
        )
        return cls(asks=tuple(asks), fill=fill, **data)

    def __str__(self) -> str:
        limits = (
            f"blocks={self.num_blocks}x{self.block_size} max_num_seqs={self.max_num_seqs} "
            f"max_num_batched_tokens={self.max_num_batched_tokens}"
        )
        lines = [
            f"seed={self.seed} {limits} max_inflight={self.max_inflight} placeholders={self.placeholders} "
            f"eos={self.eos}"
        ]
        lines += [
            f"  {role}={name} {' '.join(f'{role}.{k}={v}' for k, v in given)}".rstrip()
            for role, name, given in self.fill
        ]
        for a in self.asks:
            hidden = f" output_len={a.output_len}" if a.output_len is not None else ""
            tags = "".join(
                f" {k}={v}"
                for k, v in (("client", a.client), ("priority", a.priority), ("salt", a.salt))
                if v
            )
            then = "".join(f" then +{list(t.tokens)} max_tokens={t.max_tokens}" for t in a.turns)
            lines.append(
                f"  {a.id}: t={a.time:.2f} prompt={list(a.prompt)} "
                f"max_tokens={a.max_tokens}{hidden}{tags}{then}"
            )
        return "\n".join(lines)


# ---- the expected answer, worked out without an engine ---------------------------------------------------


def expected_output(
    case: Case, id: str, num_prompt_tokens: int, max_tokens: int, output_len: int | None
) -> list[int]:
    """The tokens a request must get, whatever the policies do: a function of the seed, its id and the
    position."""
    tokens: list[int] = []
    longest = min(max_tokens, CONTEXT - num_prompt_tokens, output_len if output_len is not None else CONTEXT)
    while len(tokens) < longest:
        tokens.append(sampled_token(case.seed, id, num_prompt_tokens + len(tokens), VOCAB))
        if case.eos and output_len is None and tokens[-1] == 0:
            break
    return tokens


def feasible(case: Case, prompt: list[int], max_tokens: int, output_len: int | None) -> bool:
    """Whether the core must take this request: a prompt inside the context whose KV fits an empty pool."""
    if (
        not 0 < len(prompt) < CONTEXT
        or any(not 0 <= t < VOCAB for t in prompt)
        or (output_len is not None and output_len < 1)
    ):
        return False
    longest = min(
        CONTEXT, len(prompt) + max_tokens, len(prompt) + (output_len if output_len is not None else CONTEXT)
    )
    return -(-(longest - 1) // case.block_size) <= case.num_blocks


# ---- made by chance --------------------------------------------------------------------------------------


def random_case(seed: int, random_roles: dict[str, list[tuple[str, dict[str, list[Any]]]]]) -> Case:
    """A tiny case full of shared prefixes, preemptions and evictions. `random_roles`: role -> choices of
    (name, parameter -> values)."""
    rng = Random(f"case/{seed}")
    fill = []
    for role, choices in random_roles.items():
        name, parameters = rng.choice(choices)
        fill.append((role, name, tuple((k, rng.choice(values)) for k, values in parameters.items())))
    block_size = rng.choice([1, 1, 2, 3, 4])
    case = Case(
        seed,
        (),
        block_size,
        rng.randint(6, 22),
        rng.choice([1, 2, 3, 8]),
        rng.choice([4, 9, 16, 64]),
        rng.choice([1, 1, 2, 3]),
        rng.random() < 0.7,
        rng.random() < 0.5,
        rng.choice([0.0, 0.001]),
        rng.randint(3, 60) if rng.random() < 0.05 else None,
        tuple(fill),
    )
    common = [1 if rng.random() < 0.8 else rng.randrange(VOCAB) for _ in range(24)]
    asks, time = [], 0.0
    for i in range(rng.randint(1, 12)):
        time += rng.choice([0.0, 0.0, STEP_SECONDS, 5 * STEP_SECONDS])
        asks.append(_random_ask(rng, f"r{i}", time, common))
    return replace(case, asks=tuple(asks))


def _random_ask(rng: Random, id: str, time: float, common: list[int]) -> Ask:
    length = rng.randint(1, 20)
    shared = rng.randint(0, length)
    prompt = common[:shared] + [rng.randrange(VOCAB) for _ in range(length - shared)]
    if rng.random() < 0.02:
        # refused: empty, outside the vocabulary, too long
        prompt = rng.choice([[], prompt + [VOCAB], prompt * 20])
    turns = [
        Turn(
            rng.choice([0.0, 2 * STEP_SECONDS]),
            tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 4))),
            rng.randint(1, 5),
        )
        for _ in range(rng.choice([0, 0, 0, 1, 2]))
    ]
    return Ask(
        id=id,
        time=time,
        prompt=tuple(prompt),
        max_tokens=rng.randint(1, 12),
        output_len=rng.choice([None, None, 1, 3, 7]),
        client=f"c{rng.randrange(3)}",
        category=rng.choice(["chat", "api"]),
        priority=rng.randrange(3),
        tool=rng.choice(["", "", "search"]),
        salt=rng.choice(["", "", "", "salt"]),
        slo=(rng.choice([None, 0.1, 0.5]), rng.choice([None, 0.02]), rng.choice([None, 1.0])),
        turns=tuple(turns),
    )
