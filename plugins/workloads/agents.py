"""Recorded agent programs in a closed loop: each call waits for the one before it and for the tool that ran
in between."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from headway import Arrival, Registry, Request, RequestState, Tags, hookimpl, param

from .content import Content, Numbering, only_its_length
from .lines import Lines, Malformed, json_object, parsed, regular_file
from .numbers import count, seconds
from .pace import TimedWorkload


class Call(NamedTuple):
    """One request of a program. Lengths in tokens; ids are those of Content, equal within one session
    only."""

    input_len: int
    output_len: int
    block_ids: array[int]
    tail_id: int  # of the tokens after the last whole block
    think_time: float  # seconds between the answer before it and this call
    tool: str  # what follows its answer: "tool", or "" at the end of a turn


class Session(NamedTuple):
    id: str
    block_size: int
    calls: list[Call]


EXPECTED = "a file with agent sessions, one JSON object a line"


@dataclass
class Agents(TimedWorkload):
    """Agent sessions of kv-cache-tester (JSON lines, gzip or not), replayed in a closed loop of calls, tools
    and thinking.

    One session a line: `block_size` and `requests` with `in`, `out`, `hash_ids` (whole blocks of the prompt,
    local to the session), `think_time` and `stop`; a sub-agent's calls run where it was started. `arrival`
    says when sessions begin. A session ends where its next prompt would not fit the context; `scale` makes
    long ones fit.
    """

    path: str = ""
    limit: int | None = param(None, min=1, max=2**31 - 1, doc="first so many sessions")
    scale: float = param(
        1.0,
        min=1e-6,
        max=1000,
        doc="prompts, answers and blocks are scaled by it: 0.125 makes 64-token blocks 8",
    )
    think_scale: float = param(1.0, min=0, max=1e6, doc="think and tool times are multiplied by it")

    def check(self) -> None:
        regular_file(self.path, EXPECTED)

    def sessions(self) -> Iterator[Session]:
        """Those of the file, one a line. Raises WorkloadError with file and line for what cannot be read."""
        yield from islice(parsed(self.path, EXPECTED, sessions), self.limit)

    def requests(self, seed: int, vocab_size: int, max_model_len: int) -> Iterator[Arrival]:
        self._content, self._max_model_len = Content(seed, vocab_size), max_model_len
        self._sessions = {session.id: session for session in self.sessions() if session.calls}
        for id in self._sessions:
            yield self._call(id, 0, 0.0)

    def _call(self, id: str, turn: int, now: float) -> Arrival:
        calls = self._sessions[id].calls
        call, length = calls[turn], self._length(id, turn)
        prompt = self._prompt(id, turn) if length < self._max_model_len else only_its_length(length)
        tags = Tags(
            client=id,
            session=id,
            turn=turn,
            category="agent",
            tool=call.tool,
            parents=(f"{id}.{turn - 1}",) if turn else (),
            last=turn + 1 == len(calls),
        )
        time = now + call.think_time * self.think_scale if turn else now
        return Arrival(
            time, prompt, self.sampling(), self._scaled(call.output_len), id=f"{id}.{turn}", tags=tags
        )

    def _scaled(self, tokens: int) -> int:
        return max(1, round(tokens * self.scale)) if tokens else 0

    def _length(self, id: str, turn: int) -> int:
        return self._scaled(self._sessions[id].calls[turn].input_len)

    def _prompt(self, id: str, turn: int) -> list[int]:
        session, length, content = self._sessions[id], self._length(id, turn), self._content
        block = max(1, round(session.block_size * self.scale))
        prompt: list[int] = []
        for block_id in session.calls[turn].block_ids[: length // block]:
            prompt += content.tokens(block_id, block)
        return prompt + content.tokens(session.calls[turn].tail_id, length - len(prompt))

    def on_result(self, request: Request, now: float) -> Iterable[Arrival]:
        id, turn = request.tags.session, request.tags.turn + 1
        goes_on = turn < len(self._sessions[id].calls) and request.state is RequestState.FINISHED
        if goes_on and self._length(id, turn) < self._max_model_len:
            return [self.dealt(self._call(id, turn, now))]
        return super().on_result(request, now)


def sessions(lines: Lines) -> Iterator[Session]:
    seen: dict[str, int] = {}
    number = Numbering()
    for line, text in lines:
        try:
            session = json_object(line, text)
        except Malformed as error:
            raise Malformed(line, f"no agent session: {error}") from None
        if missing := [key for key in ("requests", "id", "block_size") if key not in session]:
            raise Malformed(line, f"no agent session: lacks {', '.join(map(repr, missing))}")
        id = str(session["id"])
        if id in seen:
            expected = "ids must be unique, a session is one line"
            raise Malformed(line, f"session id {id!r} is that of line {seen[id]} too: {expected}")
        seen[id] = line
        block_size = count(line, "block_size", session["block_size"])
        number = Numbering(number.end)  # ids mean nothing in another session
        calls = [_call(line, entry, block_size, number) for entry in _entries(line, session["requests"])]
        yield Session(id, block_size, calls)


def _entries(line: int, requests: Any) -> Iterator[dict[str, Any]]:
    """The calls in their order; those of a sub-agent come where it was started."""
    if not isinstance(requests, list) or not all(isinstance(entry, dict) for entry in requests):
        shown = repr(str(requests)[:60])
        raise Malformed(line, f"no agent session: requests are {shown}: expected a list of objects")
    last = 0.0  # of a sub-agent's calls, counted from its own start
    for entry in requests:
        time = seconds(line, "t", entry.get("t", last))
        if time < last:
            raise Malformed(line, f"t {time} runs backwards: the call before it began at {last} s")
        last = time
        if entry.get("type") == "subagent":
            yield from _entries(line, entry.get("requests"))
        else:
            yield entry


def _call(line: int, entry: dict[str, Any], block_size: int, number: Numbering) -> Call:
    if missing := [key for key in ("in", "out", "hash_ids") if key not in entry]:
        raise Malformed(line, f"no agent session: a request lacks {', '.join(map(repr, missing))}")
    ids = entry["hash_ids"]
    if not isinstance(ids, list) or not all(type(id) is int and id >= 0 for id in ids):
        raise Malformed(line, f"hash_ids {str(ids)[:60]}: expected a list of whole numbers from 0")
    length = count(line, "in", entry["in"])
    if len(ids) * block_size > length:  # fewer are well: what no block covers is the call's own
        fit = f"expected at most {length // max(1, block_size)}, its whole blocks"
        raise Malformed(
            line, f"{len(ids)} hash_ids of {block_size} tokens contradict {length} input tokens: {fit}"
        )
    think = seconds(line, "think_time", entry.get("think_time", 0.0))
    if think < 0:
        raise Malformed(line, f"think_time {think}: a negative time")
    blocks = array("q", (number(id) for id in ids))
    tail = number(object())  # shared with nobody
    tool = "tool" if entry.get("stop") == "tool_use" else ""
    return Call(length, count(line, "out", entry["out"]), blocks, tail, think, tool)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("workload", "agents", Agents)
