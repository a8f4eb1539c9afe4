"""Offline generation, for people who know vLLM's `LLM`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from headway import Arrival, Composition, ConfigError, EngineConfig, ModelConfig, ModelError, SamplingParams, build, load_registry, near
from headway import RequestOutput as EngineOutput

from . import TorchExecutor

if TYPE_CHECKING:
    from .execution import TokenLogprobs

Prompt = str | Sequence[int] | Mapping[str, Any]

DEFAULTS = {
    "scheduler": "chunked", "order": "fcfs", "victim": "newest", "cache": "hash", "eviction": "lru", "executor": "torch", "kernels": "torch",
}  # fmt: skip
OPTIONAL = ("budget", "admission", "predictor", "retention")
PARALLEL = {"tensor_parallel_size": "tp", "pipeline_parallel_size": "pp"}


@dataclass(frozen=True)
class Logprob:
    logprob: float
    rank: int  # in the vocabulary, from 1
    decoded_token: str | None


@dataclass(frozen=True)
class CompletionOutput:
    """finish_reason: "stop", "length", "rejected" or "aborted"."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[dict[int, Logprob]] | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        return None if self.logprobs is None else sum(at[token].logprob for at, token in zip(self.logprobs, self.token_ids, strict=True))


@dataclass(frozen=True)
class RequestOutput:
    """One prompt's answer; `error` says why it was rejected, "" otherwise."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    error: str = ""
    finished: bool = field(default=True)


class LLM:
    """A model and an engine in this process.

    model: tiny, smollm2, a checkpoint directory or a hub id. options, by name:
      a role's choice      scheduler="fcfs", cache="radix", order=dict(name="sjf", ...), ...; the defaults are chunked and hash
      engine limits        block_size, num_blocks, max_num_seqs, max_num_batched_tokens, max_inflight, max_model_len
      the executor's       device, gpu_memory_utilization, kv_cache_gb, profile
      the model's          dtype, load_format and the shape for load_format="dummy"
      seed, tensor_parallel_size, pipeline_parallel_size
    """

    def __init__(self, model: str, **options: Any) -> None:
        registry = load_registry()
        self._run = build(registry, _compose(model, options))
        self.engine = self._run.engine
        self.tokenizer = getattr(self.engine.executor, "tokenizer", None)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Answers in the order of the prompts: texts, lists of token ids, or dicts with `prompt` or `prompt_token_ids`.

        sampling_params: one for all, or one a prompt. A bad request is rejected, with the reason in its `error`; the rest finish.
        """
        asked = _as_list(prompts)
        sampling = sampling_params if isinstance(sampling_params, Sequence) else [sampling_params or SamplingParams()] * len(asked)
        if len(sampling) != len(asked):
            raise ConfigError(f"{len(asked)} prompts and {len(sampling)} sampling_params: expected one for all, or one a prompt")
        arrivals: list[Arrival] = []
        answers: list[RequestOutput | None] = []
        for prompt, parameters in zip(asked, sampling, strict=True):
            text, token_ids, problem = self._read(prompt)
            if problem:
                answers.append(_rejected(text, token_ids, problem))
            else:
                answers.append(None)
                arrivals.append(Arrival(0.0, token_ids, parameters, prompt=text))
        done = iter(self.engine.run(arrivals).outputs)
        came = iter(arrivals)
        return [answer or self._output(next(done), next(came)) for answer in answers]

    def chat(self, messages: Sequence[Any], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None) -> list[RequestOutput]:
        """Like `generate`, for one conversation (a list of {"role", "content"}) or a list of them."""
        if self.tokenizer is None:
            raise ModelError("chat needs a tokenizer with a chat template, and this model has none")
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        return self.generate([self.tokenizer.encode_chat(conversation) for conversation in conversations], sampling_params)

    def close(self) -> None:
        """Gives the model's memory back."""
        self.engine.executor.close()

    def _read(self, prompt: Prompt) -> tuple[str | None, list[int], str]:
        """A prompt as (text, token ids, what is wrong with it)."""
        if isinstance(prompt, Mapping):
            prompt = prompt.get("prompt_token_ids") or prompt.get("prompt") or []
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ModelError("this model has no tokenizer (random weights without a checkpoint): give token ids")
            return prompt, self.tokenizer.encode(prompt), ""
        try:
            token_ids = list(prompt)
        except TypeError:
            token_ids = [prompt]
        if wrong := [token for token in token_ids if not isinstance(token, int) or isinstance(token, bool)]:
            return None, [], f"prompt holds {wrong[0]!r}: expected a text or a list of token ids"
        return None, token_ids, ""

    def _output(self, output: EngineOutput, arrival: Arrival) -> RequestOutput:
        if output.state == "rejected":
            return _rejected(arrival.prompt, arrival.prompt_token_ids, output.finish_reason, output.id)
        tokens = output.output_token_ids
        text = output.text if output.text is not None else self._decode(tokens)
        logprobs = [self._logprobs(at) for at in output.logprobs] if arrival.sampling.logprobs is not None else None
        reason = output.finish_reason if output.state == "finished" else output.state
        completion = CompletionOutput(0, text, tokens, reason, logprobs)
        return RequestOutput(output.id, arrival.prompt, arrival.prompt_token_ids, [completion], output.num_cached_tokens)

    def _decode(self, tokens: list[int]) -> str:
        return "" if self.tokenizer is None else self.tokenizer.decode(tokens)

    def _logprobs(self, at: TokenLogprobs) -> dict[int, Logprob]:
        """The sampled token first, then the best ones."""
        ranked = {token: (logprob, rank) for rank, (token, logprob) in enumerate(at.best.items(), 1)}
        ranked = {at.token: (at.logprob, at.rank)} | ranked
        return {token: Logprob(*ranked[token], None if self.tokenizer is None else self.tokenizer.decode([token], False)) for token in ranked}


def _compose(model: str, options: dict[str, Any]) -> Composition:
    """Each option to where it belongs. Raises ConfigError with the near names for an unknown one."""
    engine = {f.name for f in fields(EngineConfig)}
    executor = {f.name for f in fields(TorchExecutor)}
    models = {f.name for f in fields(ModelConfig)} - {"name_or_path"}
    known = {*DEFAULTS, *OPTIONAL, *engine, *executor, *models, *PARALLEL, "seed"}
    if unknown := [name for name in options if name not in known]:
        raise ConfigError(f"LLM has no option {unknown[0]!r}.{near(unknown[0], known)}")
    choices: dict[str, tuple[str, dict[str, Any]]] = {}
    for role in (*DEFAULTS, *OPTIONAL):
        choice = options.get(role, DEFAULTS.get(role))
        if isinstance(choice, Mapping):
            parameters = dict(choice)
            choices[role] = parameters.pop("name", DEFAULTS.get(role, "")), parameters
        elif choice is not None:
            choices[role] = choice, {}
    name, parameters = choices["executor"]
    choices["executor"] = name, parameters | {n: v for n, v in options.items() if n in executor}
    composition = Composition(
        choices,
        EngineConfig(**{"max_inflight": 2} | {n: v for n, v in options.items() if n in engine}),
        ModelConfig(name_or_path=model, **{n: v for n, v in options.items() if n in models}),
        seed=options.get("seed", 0),
    )
    for option, axis in PARALLEL.items():
        if option in options:
            setattr(composition.parallel, axis, options[option])
    return composition


def _as_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    prompts = list(prompts)
    return [prompts] if prompts and all(isinstance(token, int) for token in prompts) else prompts


def _rejected(text: str | None, token_ids: list[int], reason: str, id: str = "") -> RequestOutput:
    return RequestOutput(id, text, token_ids, [CompletionOutput(0, "", [], "rejected")], error=reason)
