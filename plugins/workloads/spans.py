"""What vLLM says of its requests through OpenTelemetry: an export of spans, as the collector's file exporter
writes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .lines import Lines, Malformed, json_object
from .numbers import count, seconds
from .trace_rows import Row, Source

#: Names of OpenTelemetry's conventions for generative AI: vLLM's first, then what later versions of the
#: conventions call them.
INPUT = ("gen_ai.usage.prompt_tokens", "gen_ai.usage.input_tokens")
OUTPUT = ("gen_ai.usage.completion_tokens", "gen_ai.usage.output_tokens")
REQUEST = "gen_ai.request.id"
SESSION = ("gen_ai.conversation.id", "session.id")
CLIENT = ("enduser.id", "user.id")


def otel(lines: Lines, source: Source) -> Iterator[Row]:
    """OTLP in JSON, an export a line: a request is a span that counts its tokens; it came when the span
    started.

    Spans that count none are other work of the same trace. No identity of prompts, so no reuse.
    """
    for number, text in lines:
        for span in _spans(number, json_object(number, text)):
            said = _attributes(number, span)
            lengths = [_first(said, names) for names in (INPUT, OUTPUT)]
            if lengths == [None, None]:
                continue
            for name, length in zip((INPUT[0], OUTPUT[0]), lengths, strict=True):
                if length is None:
                    raise Malformed(number, f"a span counts its tokens, but lacks {name}")
            if "startTimeUnixNano" not in span:
                raise Malformed(number, "a span that counts its tokens lacks startTimeUnixNano")
            yield Row(
                time=seconds(number, "startTimeUnixNano", span["startTimeUnixNano"], 10**9),
                input_len=count(number, INPUT[0], lengths[0]),
                output_len=count(number, OUTPUT[0], lengths[1]),
                client=str(_first(said, CLIENT) or ""),
                session=str(_first(said, SESSION) or ""),
                id=str(said.get(REQUEST, "")),
            )


def _spans(line: int, export: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of one export. `scopeSpans` was called instrumentationLibrarySpans once."""
    for resource in _listed(line, export, "resourceSpans"):
        for scope in _listed(line, resource, "scopeSpans"):
            yield from _listed(line, scope, "spans")


def _listed(line: int, parent: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = parent.get(key)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise Malformed(line, f"no export of spans: {key} is {str(found)[:40]}, expected a list of objects")
    return found


def _attributes(line: int, span: dict[str, Any]) -> dict[str, Any]:
    """name -> value, whatever type of value it is."""
    found: dict[str, Any] = {}
    for entry in span.get("attributes", ()):
        if not isinstance(entry, dict) or not isinstance(entry.get("value"), dict) or len(entry["value"]) > 1:
            raise Malformed(
                line, f"an attribute is {str(entry)[:60]}: expected a key, and a value of one type"
            )
        found[str(entry.get("key"))] = next(iter(entry["value"].values()), None)
    return found


def _first(said: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((said[name] for name in names if name in said), None)
