"""Real text, tokenized with the model's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, ClassVar

from headway import (
    Arrival,
    Context,
    ModelError,
    Registry,
    SamplingParams,
    Tags,
    WorkloadError,
    hookimpl,
    param,
)

from .lines import Lines, Malformed, json_object, parsed
from .pace import TimedWorkload

PROMPTS = (
    "What is the capital of France, and which river runs through it?",
    "Explain in two sentences why the sky is blue.",
    "Write a haiku about a train that is late.",
    "List three things to check before a long bicycle ride.",
    "What is the difference between a list and a tuple in Python?",
    "Give me a simple recipe for tomato soup.",
    "Why do we have leap years?",
    "Translate 'good morning, how are you?' into Spanish.",
    "A shop sells pens at 2 euros each. How much do 7 pens cost?",
    "Name the planets of the solar system in order from the Sun.",
    "Describe what an operating system does to someone who is ten years old.",
    "Suggest a title for a short story about a lighthouse keeper.",
    "What happens to water when it freezes?",
    "Write a polite message that moves a meeting from Monday to Tuesday.",
    "Who wrote 'Romeo and Juliet', and about when?",
    "How do vaccines protect us from disease?",
)


@dataclass
class Chat(TimedWorkload):
    """Real prompts through the model's chat template; the model decides how long it answers.

    The prompts are a small built-in set, or those of `path`: one a line, or JSON lines with a "prompt".
    """

    path: str = ""  # "": the built-in prompts
    num_requests: int | None = param(
        None,
        min=1,
        max=10_000_000,
        doc="None: each prompt once; more than there are begins again",
    )
    system: str = ""  # a system message for every conversation
    max_tokens: int | None = param(64, min=1, max=2**31 - 1, unit="tokens")

    tokenizer: ClassVar[Any] = None  # the executor's

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self.tokenizer = ctx.tokenizer  # type: ignore[misc]

    def check(self) -> None:
        self.texts()

    def texts(self) -> list[str]:
        """The prompts. Raises WorkloadError with file and line for what cannot be read."""
        if not self.path:
            return list(PROMPTS)
        texts = list(parsed(self.path, EXPECTED, _prompts if self.path.endswith(".jsonl") else _plain))
        if not texts:
            raise WorkloadError(f"{self.path}: holds no prompt")
        return texts

    def requests(self, seed: int, vocab_size: int, max_model_len: int) -> Iterator[Arrival]:
        if self.tokenizer is None:
            raise WorkloadError(
                "workload=chat needs the model's tokenizer, and this executor has none: use executor=torch"
            )
        texts, sampling = self.texts(), self.sampling()
        for text in islice(cycle(texts), len(texts) if self.num_requests is None else self.num_requests):
            yield self._arrival(text, sampling)

    def _arrival(self, text: str, sampling: SamplingParams) -> Arrival:
        """A text that the tokenizer or its template refuses is a request that is refused; the others are
        asked."""
        refusal, tokens = "", []
        try:
            tokens = self._encode(text)
        except ModelError as error:
            refusal = str(error)
        return Arrival(0.0, tokens, sampling, tags=Tags(category="chat"), prompt=text, refusal=refusal)

    def _encode(self, text: str) -> list[int]:
        tokenizer = self.tokenizer
        if not tokenizer.has_chat_template:
            return list(tokenizer.encode(f"{self.system}\n{text}" if self.system else text))
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": text})
        return list(tokenizer.encode_chat(messages))


EXPECTED = "a file of prompts, one a line"


def _plain(lines: Lines) -> Iterator[str]:
    for _, text in lines:
        yield text


def _prompts(lines: Lines) -> Iterator[str]:
    for number, text in lines:
        prompt = json_object(number, text).get("prompt")
        if not isinstance(prompt, str):
            raise Malformed(number, 'expected a JSON object with "prompt", a text')
        if prompt.strip():
            yield prompt


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("workload", "chat", Chat)
