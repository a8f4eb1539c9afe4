"""Text to tokens and back, from a checkpoint's tokenizer.json; no transformers, so that it loads in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from headway import ModelError, Request


class Tokenizer:
    """`encode` adds the special tokens that the tokenizer itself adds; `decode` leaves special tokens out."""

    def __init__(self, directory: Path) -> None:
        from tokenizers import Tokenizer as Fast

        self.directory = directory
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{path} is missing: texts need a tokenizer in that format; without one give token ids")
        try:
            self._fast = Fast.from_file(str(path))
        except Exception as error:
            raise ModelError(f"{path} cannot be read: {error}") from None

    def encode(self, text: str) -> list[int]:
        return self._fast.encode(text).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._fast.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """messages: {"role", "content"} each; the prompt that asks for the assistant's answer."""
        if self._chat_template is None:
            raise ModelError(f"the tokenizer in {self.directory} has no chat template: give plain texts")
        text = self._template.render(messages=list(messages), add_generation_prompt=True, **self._named_tokens)
        return self._fast.encode(text, add_special_tokens=False).ids

    @cached_property
    def _chat_template(self) -> str | None:
        """The Jinja source, where the checkpoint has one."""
        path = self.directory / "chat_template.jinja"
        source = path.read_text(encoding="utf-8") if path.is_file() else self._settings.get("chat_template")
        if isinstance(source, list):  # several named ones
            return next((t["template"] for t in source if t["name"] == "default"), None)
        return source

    @cached_property
    def _settings(self) -> dict[str, Any]:
        path = self.directory / "tokenizer_config.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @property
    def _named_tokens(self) -> dict[str, str]:
        """bos_token, eos_token ... as templates use them: a string, or an object with its content."""
        named = {k: v["content"] if isinstance(v, dict) else v for k, v in self._settings.items() if k.endswith("_token")}
        return {k: v for k, v in named.items() if isinstance(v, str)}

    @cached_property
    def _template(self) -> Any:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals["raise_exception"] = _refuse
        return environment.from_string(self._chat_template or "")


def stop_text(tokenizer: Tokenizer) -> Callable[[Request], bool]:
    """For `Engine(stop_text=...)`: true when the newest token completes one of the request's stop strings.

    Sets `request.stop_text` to the answer before the stop string. Only as many last tokens are decoded as the longest stop
    string can span, so the cost of a token does not grow with the answer.
    """

    def stopped(request: Request) -> bool:
        stops = request.sampling.stop
        answer = request.output_token_ids
        longest = max(len(s.encode()) for s in stops)
        span = longest + 8  # a token is a byte or more; the tail may begin inside a letter
        while len(tail := tokenizer.decode(answer[-span:])) < longest and span < len(answer):
            span *= 2  # special tokens decode to nothing
        if not any(s in tail for s in stops):
            return False
        text = tokenizer.decode(answer)
        found = [at for s in stops if (at := text.find(s)) >= 0]
        if not found:  # an artefact of where the tail was cut
            return False
        request.stop_text = text[: min(found)]
        return True

    return stopped


def _refuse(message: str) -> None:
    raise ModelError(f"the chat template refuses these messages: {message}")
