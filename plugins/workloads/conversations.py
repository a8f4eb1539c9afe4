"""Public traces that know which requests belong together: turns of a conversation, calls of an agent,
components of a prompt."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

from headway import WorkloadError

from .agents import sessions
from .lines import Lines, Malformed, json_object, parsed
from .numbers import count, seconds
from .trace_rows import Row, Source, block_ids, required

BAILIAN_BLOCK = 16  # tokens a hash id stands for
BAILIAN_KEYS = ("chat_id", "parent_chat_id", "timestamp", "input_length", "output_length", "hash_ids")
RAGPULSE_BLOCK = 16  # tokens; its components have lengths of their own, and are cut into blocks here
RAGPULSE_KEYS = ("timestamp", "input_length", "output_length", "hash_ids", "session_id")
#: Components of a RAGPulse prompt in the order in which they are listed, and the files that say how long they
#: are.
COMPONENTS = {
    "sys_prompt": "1_sys_prompt",
    "passages_ids": "2_passages",
    "history": "3_history",
    "web_search": "5_web_search",
    "user_input": "4_user_input",
}


def qwen_bailian(lines: Lines, source: Source) -> Iterator[Row]:
    """Qwen-Bailian usage traces (Wang et al., ATC'25): timestamp (s), lengths, hash_ids of 16-token blocks,
    the last one partial, and the chat that each one continues.

    A parent that the file does not hold was asked before it begins. A chat before its own parent is an error:
    turns go forward in time.
    """
    known: dict[int, tuple[int, float, str]] = {}  # chat -> its line, time and session
    awaited: dict[int, int] = {}  # parent that was not seen so far -> line of its child
    for number, text in lines:
        entry = json_object(number, text)
        required(number, entry, BAILIAN_KEYS)
        chat, parent = (_chat(number, key, entry[key]) for key in ("chat_id", "parent_chat_id"))
        time = seconds(number, "timestamp", entry["timestamp"])
        if chat in known:
            raise Malformed(
                number, f"chat_id {chat} is that of line {known[chat][0]} too: expected a chat a line"
            )
        if chat in awaited:
            raise Malformed(
                number, f"chat_id {chat} is the parent of line {awaited[chat]}, which stands before it"
            )
        before = known.get(parent)
        if before is None and parent >= 0:
            awaited.setdefault(parent, number)
        if before is not None and time < before[1]:
            turns = f"its parent, line {before[0]}, came at {before[1]} s"
            raise Malformed(number, f"timestamp {time} runs backwards: {turns}")
        session = before[2] if before else str(chat)
        known[chat] = number, time, session
        length = count(number, "input_length", entry["input_length"])
        yield Row(
            time=time,
            input_len=length,
            output_len=count(number, "output_length", entry["output_length"]),
            block_ids=block_ids(number, "hash_ids", entry["hash_ids"], length, size=BAILIAN_BLOCK),
            block_size=BAILIAN_BLOCK,
            session=session,
            id=str(chat),
            parent=str(parent) if before else "",
            category=str(entry.get("type", "")),
        )


def _chat(line: int, key: str, value: Any) -> int:
    if type(value) is not int or value < -1:
        raise Malformed(line, f"{key} {str(value)[:40]!r}: expected a whole number, or -1 for none")
    return value


def ragpulse(lines: Lines, source: Source) -> Iterator[Row]:
    """RAGPulse (Wang et al., 2025): prompts as lists of components, whose lengths stand in the files beside
    the trace.

    The components follow each other in the order in which they are listed; the few tokens that their lengths
    leave open come last and are shared with nobody. A block of 16 tokens is shared by prompts that agree up
    to its end.
    """
    lengths = {name: _component_lengths(Path(source.path).expanduser(), name) for name in COMPONENTS}
    for number, text in lines:
        entry = json_object(number, text)
        required(number, entry, RAGPULSE_KEYS)
        length = count(number, "input_length", entry["input_length"])
        chain = _components(number, entry["hash_ids"], lengths)
        if (covered := sum(tokens for _, tokens in chain)) > length:
            raise Malformed(number, f"its components have {covered} tokens: more than input_length {length}")
        session = str(entry["session_id"])
        yield Row(
            time=seconds(number, "timestamp", entry["timestamp"]),
            input_len=length,
            output_len=count(number, "output_length", entry["output_length"]),
            block_ids=_blocks_of(chain, length, RAGPULSE_BLOCK, number),
            block_size=RAGPULSE_BLOCK,
            session=session,
        )


def _components(line: int, given: Any, lengths: dict[str, dict[int, int]]) -> list[tuple[Hashable, int]]:
    """(name, tokens) of each component of a prompt, in order."""
    if not isinstance(given, dict) or (unknown := given.keys() - COMPONENTS.keys()):
        what = f"has {', '.join(sorted(unknown))}" if isinstance(given, dict) else f"is {str(given)[:40]}"
        raise Malformed(line, f"hash_ids {what}: expected an object with {', '.join(COMPONENTS)}")
    chain: list[tuple[Hashable, int]] = []
    for name in COMPONENTS:
        for id in given.get(name, ()):
            if id not in lengths[name]:
                raise Malformed(
                    line, f"{name} {str(id)[:40]} is not in {COMPONENTS[name]}*.jsonl beside the trace"
                )
            chain.append(((name, id), lengths[name][id]))
    return chain


def _blocks_of(chain: list[tuple[Hashable, int]], length: int, size: int, own: int) -> list[Hashable]:
    """Names of the blocks of a prompt: of each, all that the prompt holds up to its end."""
    ids: list[Hashable] = []
    before: Hashable = ()
    end = 0
    for piece, tokens in [*chain, (("rest", own), length - sum(t for _, t in chain))]:
        before, end = hash((before, piece)), end + tokens
        while len(ids) < (end if end < length else end + size - 1) // size:
            ids.append((before, len(ids)))
    return ids


def _component_lengths(trace: Path, name: str) -> dict[int, int]:
    """id -> tokens, of the file that lies beside the trace."""
    files = sorted(trace.parent.glob(f"{COMPONENTS[name]}*.jsonl*"))
    if not files:
        raise WorkloadError(
            f"{trace}: RAGPulse needs {COMPONENTS[name]}.jsonl beside it, for the lengths of {name}"
        )
    return dict(parsed(str(files[0]), f"RAGPulse's lengths of {name}", _lengths))


def _lengths(lines: Lines) -> Iterator[tuple[int, int]]:
    for number, text in lines:
        entry = json_object(number, text)
        ids = [key for key in entry if key != "token_length"]
        if len(ids) != 1 or len(entry) != 2 or type(entry[ids[0]]) is not int:
            raise Malformed(number, "expected an id and its token_length")
        yield entry[ids[0]], count(number, "token_length", entry["token_length"])


def agents(lines: Lines, source: Source) -> Iterator[Row]:
    """Agent sessions of kv-cache-tester: every call of every session, one session after the other. Their
    starts are not recorded, so they have no times here; `workload=agents` replays them in a closed loop."""
    for session in sessions(lines):
        for call in session.calls:
            yield Row(
                time=0.0,
                input_len=call.input_len,
                output_len=call.output_len,
                block_ids=call.block_ids,
                block_size=session.block_size,
                session=session.id,
            )


def sharegpt(lines: Lines, source: Source) -> Iterator[Row]:
    """ShareGPT's conversations, a JSON array or one a line: the first question and its answer, as in vLLM's
    benchmarks. They are texts without times; a token is taken as `characters_per_token` characters."""
    for number, entry in _objects(lines):
        talk = entry.get("conversations", entry.get("conversation"))
        if not isinstance(talk, list):
            raise Malformed(number, "no conversation: lacks 'conversations', a list")
        said = [turn.get("value") for turn in talk[:2] if isinstance(turn, dict)]
        if len(said) < 2:
            continue  # nobody answered
        if not all(isinstance(text, str) for text in said):
            raise Malformed(number, "no conversation: a turn lacks 'value', a text")
        asked, answered = (round(len(str(text)) / source.characters_per_token) for text in said)
        yield Row(0.0, max(1, asked), max(1, answered))


def _objects(lines: Lines) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON array, however it is broken into lines, or one object a line; each with the line
    that it ends on."""
    decoder, text, at = json.JSONDecoder(), "", 0
    last = 0
    for number, line in lines:
        last, text, at = number, f"{text[at:]}\n{line}", 0
        while True:
            while at < len(text) and text[at] in " \t\r\n[,]":
                at += 1
            if at == len(text) or not line.rstrip(" \t,]").endswith("}"):
                break
            try:
                found, at = decoder.raw_decode(text, at)
            except (json.JSONDecodeError, RecursionError):
                break  # goes on in the next line
            if not isinstance(found, dict):
                raise Malformed(number, f"expected an object for each conversation, got {str(found)[:40]}")
            yield number, found
    if text[at:].strip(" \t\r\n[,]"):
        raise Malformed(last, "no JSON: the file ends within a conversation")
