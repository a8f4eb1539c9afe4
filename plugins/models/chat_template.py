"""Chat templates of a checkpoint: where they are found, what they are given, and the process that renders
them."""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import reprlib
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headway import ModelError

from . import template_worker as limits
from .files import is_there, read_text

#: Names of a message's reasoning; the first is the one that templates read.
REASONING = ("reasoning_content", "thinking", "reasoning")
#: What the rendering process sees of the environment.
KEPT = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV", "TZ", "LANG", "LC_ALL")
EXPECTED = 'chat_template: expected a text, or a list of {"name", "template"}'


@dataclass(frozen=True)
class ChatTemplate:
    """One Jinja source and the file it comes from."""

    source: str
    path: Path


class ChatTemplates:
    """A checkpoint's templates by name, as transformers 5 finds them: chat_template.jinja and
    additional_chat_templates/ before tokenizer_config.json. `variables` are what every template sees:
    bos_token, eos_token, ..."""

    def __init__(self, directory: Path, settings: Mapping[str, Any], variables: Mapping[str, str]) -> None:
        self.directory, self.variables = directory, dict(variables)
        path = directory / "tokenizer_config.json"
        self.named = _from_files(directory) or _from_settings(path, settings.get("chat_template"))

    def render(
        self,
        messages: Sequence[Any],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """One conversation as text. chat_template: the name of one of several, or a template itself.

        Raises ModelError with the template's file and line for what the template, its limits or the messages
        refuse.
        """
        template = self._choose(chat_template, tools)
        given = {
            "messages": _conversation(messages),
            "tools": _objects("tools", tools),
            "documents": _objects("documents", documents),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            if (size := _characters(messages)) > limits.LONGEST:
                raise ModelError(f"messages of {size:,} characters: expected at most {limits.LONGEST:,}")
            return _process.render(template, _plain({**self.variables, **variables, **given}))
        except RecursionError:
            raise ModelError("messages are nested too deeply, or contain themselves") from None
        except TypeError as error:  # keys that are no text
            raise ModelError(f"messages cannot be read: {error}: expected plain data") from None

    def _choose(self, asked: str | None, tools: Sequence[Any] | None) -> ChatTemplate:
        if asked is not None:
            return self.named.get(asked) or ChatTemplate(asked, Path("chat_template"))
        name = "tool_use" if tools is not None and "tool_use" in self.named else "default"
        if name in self.named:
            return self.named[name]
        if self.named:
            names = ", ".join(sorted(self.named))
            raise ModelError(f"{self.directory} has chat templates {names} and no default: name one")
        raise ModelError(f"the tokenizer in {self.directory} has no chat template: give plain texts")


def _from_files(directory: Path) -> dict[str, ChatTemplate]:
    files = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if is_there(path := directory / "chat_template.jinja"):
        files["default"] = path
    return {name: ChatTemplate(read_text(path), path) for name, path in files.items()}


def _from_settings(path: Path, found: Any) -> dict[str, ChatTemplate]:
    if isinstance(found, list):
        try:
            found = {entry["name"]: entry["template"] for entry in found}
        except (TypeError, KeyError):
            raise ModelError(f"{path}: {EXPECTED}") from None
    named = {"default": found} if isinstance(found, str) else found or {}
    texts = [*named.keys(), *named.values()] if isinstance(named, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise ModelError(f"{path}: {EXPECTED}")
    return {name: ChatTemplate(source, path) for name, source in named.items()}


# ---- what a template sees --------------------------------------------------------------------------------


def _conversation(messages: Any) -> list[Any]:
    """The messages without keys that say None, which templates would print; reasoning under the names that
    templates read."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ModelError(f"messages: expected a list of {{role, content}}, got {reprlib.repr(messages)}")
    if not messages:
        raise ModelError("messages: the conversation is empty: expected at least one message")
    plain = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise ModelError(f"messages: {reprlib.repr(message)}: expected an object with role and content")
        kept = {key: value for key, value in message.items() if value is not None}
        reasoning = next((kept[key] for key in REASONING if key in kept), None)
        plain.append(kept if reasoning is None else {"thinking": reasoning, **kept, REASONING[0]: reasoning})
    return plain


def _characters(value: Any) -> int:
    """Of all texts in it."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(map(_characters, value)) if isinstance(value, (list, tuple)) else 0


def _objects(name: str, given: Any) -> list[Any] | None:
    if given is None:
        return None
    if isinstance(given, (str, bytes, Mapping)) or any(not isinstance(one, Mapping) for one in given):
        raise ModelError(f"{name}={reprlib.repr(given)}: expected a list of objects (tools: JSON schemas)")
    return list(given)


def _plain(value: Any) -> Any:
    """Plain data in place of whatever the caller's objects are: a template calls methods, and rich objects
    have dangerous ones."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return getattr(kind, f"__{kind.__name__}__")(value)  # also of a subclass
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):  # pydantic
        return _plain(dump())
    return f"<{type(value).__name__}>"


# ---- the process -----------------------------------------------------------------------------------------


class TemplateProcess:
    """Renders templates in one process for all of them, started with the first. It ends itself when a
    template takes too much, and with this process, whose end closes its standard input."""

    def __init__(self, seconds: float = 2.0) -> None:
        self.seconds = seconds  # of CPU time that compiling and rendering may take
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0
        atexit.register(self.close)

    def render(self, template: ChatTemplate, variables: dict[str, Any]) -> str:
        with self._lock:
            try:
                asked = {"template": template.source, "variables": variables, "seconds": self.seconds}
                found = self._ask(json.dumps(asked))
            except BaseException:  # an answer may still come, and must not be taken for the next one
                self.close()
                raise
        if "text" in found:
            return str(found["text"])
        where = f"{template.path}:{found['line']}" if found["line"] else template.path
        raise ModelError(f"{where}: the chat template {found['error']}")

    def _ask(self, question: str) -> dict[str, Any]:
        process = self._started()
        try:
            process.stdin.write(question + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            line = process.stdout.readline()  # type: ignore[union-attr]
        except BrokenPipeError:
            line = ""
        if line:
            return dict(json.loads(line))
        code = process.wait()
        self.close()
        if code == -signal.SIGPROF:
            problem = f"takes more than {self.seconds:g} s of CPU time: it loops without end"
        elif code == limits.OUT_OF_MEMORY:
            problem = f"takes more than {limits.MEMORY >> 20} MiB of memory"
        else:
            problem = f"ended the process that renders it (exit code {code})"
        return {"error": problem, "line": 0}

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._owner == os.getpid():
            return self._process
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        # -P: modules of this folder must not be found as top-level ones.
        command = [sys.executable, "-P", str(Path(limits.__file__))]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="ascii",
            env=environment,
            start_new_session=True,  # Ctrl-C is for us
        )
        self._owner = os.getpid()
        return self._process

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.communicate()


_process = TemplateProcess()
