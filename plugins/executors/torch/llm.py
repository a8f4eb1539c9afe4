"""Offline generation, for people who know vLLM's `LLM`."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import count
from numbers import Integral
from typing import TYPE_CHECKING, Any

from headway import (
    Arrival,
    Composition,
    ConfigError,
    EngineConfig,
    HeadwayError,
    ModelConfig,
    ModelError,
    SamplingParams,
    build,
    default_names,
    load_registry,
    near,
    token_ids,
    with_names_of_today,
)
from headway import RequestOutput as EngineOutput

from ...parallel.config import MeshConfig
from . import TorchExecutor

if TYPE_CHECKING:
    from .execution import TokenLogprobs

Prompt = str | Sequence[int] | Mapping[str, Any]
Sampling = SamplingParams | Sequence[SamplingParams | None] | None
PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")

ROLES = ("scheduler", "order", "victim", "cache", "eviction", "executor", "kernels")
OPTIONAL = ("chunk", "admission", "predictor", "retention")
PARALLEL = {"tensor_parallel_size": "tp", "pipeline_parallel_size": "pp"}


@dataclass(frozen=True)
class Logprob:
    logprob: float
    rank: int  # in the vocabulary, from 1
    decoded_token: str | None


@dataclass(frozen=True)
class CompletionOutput:
    """finish_reason: "stop", "length", "rejected" or "aborted".

    stop_reason: the stop string, or the token of `stop_token_ids`, that ended the answer; None for every
    other ending. The text ends before either; the token is the last of token_ids.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[dict[int, Logprob]] | None = None
    stop_reason: int | str | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        return (
            None
            if self.logprobs is None
            else sum(at[token].logprob for at, token in zip(self.logprobs, self.token_ids, strict=True))
        )


@dataclass(frozen=True)
class RequestOutput:
    """One prompt's answer; `error` says why it was rejected, "" otherwise."""

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    error: str = ""
    finished: bool = field(default=True)


@dataclass(frozen=True)
class _Question:
    """A prompt as it is asked, or what is wrong with it."""

    prompt: str | None = None
    token_ids: Sequence[int] = ()
    cache_salt: str = ""
    problem: str = ""

    def arrival(self, id: str, sampling: SamplingParams) -> Arrival:
        return Arrival(0.0, self.token_ids, sampling, id=id, cache_salt=self.cache_salt, prompt=self.prompt)


class LLM:
    """A model and an engine in this process.

    model: tiny, smollm2, a checkpoint directory or a hub id. options, by name:
      a role's choice      scheduler="fcfs", cache="radix", order=dict(name="sjf", ...), ...; the defaults are
                           chunked and hash
      engine limits        block_size, num_blocks, max_num_seqs, max_num_batched_tokens, max_inflight,
                           max_model_len
      the executor's       device, gpu_memory_utilization, kv_cache_gb, profile
      the model's          dtype, load_format and the shape for load_format="dummy"
      seed, tensor_parallel_size, pipeline_parallel_size
    """

    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        registry = load_registry()
        self._run = build(registry, _compose(model, options))
        self.engine = self._run.engine
        self.tokenizer = self.engine.executor.tokenizer
        self._ids = count()  # of requests, over all calls
        self._closed = False

    def generate(
        self, prompts: Prompt | Iterable[Prompt], sampling_params: Sampling = None
    ) -> list[RequestOutput]:
        """Answers in the order of the prompts: texts, lists or arrays of token ids, or dicts with `prompt` or
        `prompt_token_ids`.

        sampling_params: one for all, or one for each prompt. A bad request is rejected, with the reason in
        its `error`; the rest finish. After Ctrl-C the requests that have not ended are `aborted`.
        """
        asked = _as_list(prompts)
        if self.tokenizer is None and any(isinstance(prompt, str) for prompt in asked):
            raise ModelError("this model has no tokenizer (random weights, no checkpoint): give token ids")
        return self._answer([partial(self._read, prompt) for prompt in asked], sampling_params)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: Sampling = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Like `generate`, for one conversation (a list of {"role", "content"}) or a list of them.

        The rest is for the template; `chat_template` is one, or the name of one of several.
        """
        if self.tokenizer is None or not (chat_template or self.tokenizer.has_chat_template):
            raise ModelError(
                "chat needs a tokenizer with a chat template, and this model has none: use generate"
            )
        options = dict(chat_template_kwargs or {}) | {
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
            "documents": documents,
        }
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        asked: list[Callable[[], _Question]] = [
            partial(self._read_chat, conversation, options) for conversation in conversations
        ]
        return self._answer(asked, sampling_params)

    def close(self) -> None:
        """Gives the model's memory back."""
        if not self._closed:
            self._closed = True
            self.engine.executor.close()

    def _answer(self, asked: list[Callable[[], _Question]], sampling_params: Any) -> list[RequestOutput]:
        if self._closed:
            raise ConfigError("this LLM is closed: make a new one")
        sampling = _one_each(sampling_params, len(asked))
        ids = [str(next(self._ids)) for _ in asked]
        questions = [_question(read, parameters) for read, parameters in zip(asked, sampling, strict=True)]
        arrivals = {
            id: question.arrival(id, parameters or SamplingParams())
            for id, question, parameters in zip(ids, questions, sampling, strict=True)
            if not question.problem
        }
        outputs = self.engine.run(list(arrivals.values())).outputs if arrivals else []
        done = {output.id: output for output in outputs}
        return [
            _unanswered(id, question, "rejected", question.problem)
            if question.problem
            else self._output(id, question, arrivals[id].sampling, done.get(id))
            for id, question in zip(ids, questions, strict=True)
        ]

    # ---- what is asked ------------------------------------------------------------------------------------

    def _read(self, prompt: Any) -> _Question:
        """Raises ValueError, or ModelError, that says what is wrong with it."""
        salt = ""
        text: Any = None
        if isinstance(prompt, Mapping):
            given = {key: value for key, value in prompt.items() if value is not None}
            if unknown := [key for key in given if key not in PROMPT_KEYS]:
                raise ValueError(f"a prompt has no {unknown[0]!r}: expected {', '.join(PROMPT_KEYS)}")
            salt, text = given.get("cache_salt", ""), given.get("prompt")
            if text is None and "prompt_token_ids" not in given:
                raise ValueError("a prompt as a dict needs prompt or prompt_token_ids")
            if not isinstance(text, str | None) or not isinstance(salt, str):
                raise ValueError("prompt and cache_salt: expected texts")
            prompt = given.get("prompt_token_ids", text)
        if not isinstance(prompt, str):
            known = token_ids(prompt)
            return _Question(text, known if len(known) > self.engine.max_model_len else list(known), salt)
        if self.tokenizer is None:
            raise ModelError("this model has no tokenizer: give token ids")
        return _Question(prompt, self.tokenizer.encode(prompt), salt)

    def _read_chat(self, conversation: Any, options: dict[str, Any]) -> _Question:
        assert self.tokenizer is not None  # since `chat` asked
        return _Question(token_ids=self.tokenizer.encode_chat(conversation, **options))

    # ---- what is answered ---------------------------------------------------------------------------------

    def _output(
        self,
        id: str,
        question: _Question,
        sampling: SamplingParams,
        output: EngineOutput | None,
    ) -> RequestOutput:
        if output is None:  # Ctrl-C came before it was seen
            return _unanswered(id, question, "aborted", "")
        if output.state == "rejected":
            return _unanswered(id, question, "rejected", output.finish_reason)
        by_eos = not sampling.ignore_eos and output.stop_reason in self.engine.executor.caps.eos_token_ids
        completion = CompletionOutput(
            0,
            "" if self.tokenizer is None else self.tokenizer.answer(question.token_ids, output),
            output.output_token_ids,
            output.finish_reason if output.state == "finished" else output.state,
            logprobs=[self._logprobs(at) for at in output.logprobs]
            if sampling.logprobs is not None
            else None,
            stop_reason=None if by_eos else output.stop_reason,  # as in vLLM
        )
        return RequestOutput(id, question.prompt, question.token_ids, [completion], output.num_cached_tokens)

    def _logprobs(self, at: TokenLogprobs) -> dict[int, Logprob]:
        """The sampled token first, then the best ones."""
        ranked = {token: (logprob, rank) for rank, (token, logprob) in enumerate(at.best.items(), 1)}
        ranked = {at.token: (at.logprob, at.rank)} | ranked
        piece = (lambda token: None) if self.tokenizer is None else self.tokenizer.piece
        return {token: Logprob(logprob, rank, piece(token)) for token, (logprob, rank) in ranked.items()}


def _compose(model: str | os.PathLike[str], options: dict[str, Any]) -> Composition:
    """Each option to where it belongs. Raises ConfigError with the near names for an unknown one."""
    options = with_names_of_today(options)
    engine = {f.name for f in fields(EngineConfig)}
    executor = {f.name for f in fields(TorchExecutor)}
    models = {f.name for f in fields(ModelConfig)} - {"name_or_path"}
    defaults = default_names()
    known = {*ROLES, *OPTIONAL, *engine, *executor, *models, *PARALLEL, "seed"}
    if unknown := [name for name in options if name not in known]:
        raise ConfigError(f"LLM has no option {unknown[0]!r}.{near(unknown[0], known)}")
    choices: dict[str, tuple[str, dict[str, Any]]] = {}
    for role in (*ROLES, *OPTIONAL):
        choice = options.get(role, defaults.get(role))
        if choice is not None or role in ROLES:
            choices[role] = _choice(role, choice)
    name, parameters = choices["executor"]
    choices["executor"] = name, parameters | {n: v for n, v in options.items() if n in executor}
    axes = {axis: options[option] for option, axis in PARALLEL.items() if option in options}
    return Composition(
        choices,
        EngineConfig(**{"max_inflight": 2} | {n: v for n, v in options.items() if n in engine}),
        ModelConfig(name_or_path=_name(model), **{n: v for n, v in options.items() if n in models}),
        parallel=MeshConfig(**axes),
        seed=_seed(options.get("seed", 0)),
    )


def _choice(role: str, choice: Any) -> tuple[str, dict[str, Any]]:
    """A plugin's name, or a dict of its name and parameters."""
    parameters = dict(choice) if isinstance(choice, Mapping) else {"name": choice}
    name = parameters.pop("name", default_names().get(role))
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{role}={choice!r}: expected a plugin's name, or a dict of its name and parameters"
        )
    return name, parameters


def _name(model: Any) -> str:
    if not isinstance(model, str | os.PathLike) or not isinstance(name := os.fspath(model), str) or not name:
        raise ConfigError(f"model={model!r}: expected tiny, smollm2, a checkpoint directory or a hub id")
    return name


def _seed(given: Any) -> int:
    if isinstance(given, bool) or not isinstance(given, int):
        raise ConfigError(f"seed={given!r}: expected an integer")
    return given


def _as_list(prompts: Any) -> list[Any]:
    """Prompts one by one; what is no collection of them is one prompt."""
    if isinstance(prompts, (str, bytes, bytearray, Mapping)) or not isinstance(prompts, Iterable):
        return [prompts]
    if (dimensions := getattr(prompts, "ndim", None)) == 0:
        return [prompts]
    array: Any = prompts
    listed: list[Any] = array.tolist() if dimensions == 1 else list(prompts)
    return [listed] if listed and all(isinstance(token, Integral) for token in listed) else listed


def _one_each(sampling_params: Any, count: int) -> list[Any]:
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [sampling_params] * count
    if not isinstance(sampling_params, Sequence) or isinstance(sampling_params, (str, bytes)):
        got = reprlib.repr(sampling_params)
        raise ConfigError(f"sampling_params={got}: expected SamplingParams, or one for each prompt")
    if (given := len(sampling_params)) != count:
        expected = "expected one for all, or one for each prompt"
        raise ConfigError(f"{count} prompts and {given} sampling_params: {expected}")
    return list(sampling_params)


def _question(read: Callable[[], _Question], parameters: Any) -> _Question:
    if parameters is not None and not isinstance(parameters, SamplingParams):
        return _Question(problem=f"sampling_params={reprlib.repr(parameters)}: expected SamplingParams")
    try:
        return read()
    except (HeadwayError, ValueError) as error:
        return _Question(problem=str(error))


def _unanswered(id: str, question: _Question, state: str, error: str) -> RequestOutput:
    completion = CompletionOutput(0, "", [], state)
    return RequestOutput(id, question.prompt, question.token_ids, [completion], error=error)
