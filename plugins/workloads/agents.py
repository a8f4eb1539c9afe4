"""Recorded agent programs in a closed loop: each call waits for the one before it and for the tool that ran in between."""

from __future__ import annotations

import gzip
import json
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from headway import Arrival, Request, RequestState, Tags, WorkloadError, hookimpl, param

from .content import Content
from .pace import Paced


class Call(NamedTuple):
    """One request of a program. Lengths in tokens; block ids mean something within their own session only."""

    input_len: int
    output_len: int
    block_ids: array[int]
    think_time: float  # seconds between the answer before it and this call
    tool: str  # what follows its answer: "tool", or "" at the end of a turn


@dataclass
class Agents(Paced):
    """Agent sessions of kv-cache-tester (JSON lines, gzip or not), replayed in a closed loop of calls, tools and thinking.

    One session a line: `block_size` and `requests` with `in`, `out`, `hash_ids` (whole blocks of the prompt, local to the session), `think_time` and
    `stop`; a sub-agent's calls run where it was started. `arrival` says when sessions begin. A session ends where its next prompt
    would not fit the context; `scale` makes long ones fit.
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

    def sessions(self) -> Iterator[tuple[str, int, list[Call]]]:
        """(id, block size, calls) of each line. Raises WorkloadError with file and line for what cannot be read."""
        if not self.path or not (file := Path(self.path).expanduser()).is_file():
            raise WorkloadError(f"workload.path={self.path}: expected the path of a file with agent sessions")
        number = 0
        try:
            with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if self.limit is not None and number > self.limit:
                        break
                    session = json.loads(line)
                    calls = list(_calls(session["requests"]))
                    if any(call.input_len < 0 or call.output_len < 0 or call.think_time < 0 for call in calls):
                        raise ValueError("a negative length or time")
                    yield str(session["id"]), int(session["block_size"]), calls
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, OverflowError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise WorkloadError(f"{self.path}:{max(number, 1)}: no agent session ({reason})") from error

    def requests(self, seed: int, vocab_size: int, max_model_len: int) -> Iterator[Arrival]:
        self._content, self._max_model_len = Content(seed, vocab_size), max_model_len
        self._sessions: dict[str, tuple[int, int, list[Call]]] = {}
        for serial, (id, block_size, calls) in enumerate(list(self.sessions())):
            if calls:
                self._sessions[id] = (serial, max(1, round(block_size * self.scale)), calls)
                yield self._call(id, 0, 0.0)

    def _call(self, id: str, turn: int, now: float) -> Arrival:
        serial, block, calls = self._sessions[id]
        call, content = calls[turn], self._content
        length = max(1, round(call.input_len * self.scale)) if call.input_len else 0
        prompt: list[int] = []
        for local in call.block_ids[: length // block]:
            prompt += content.tokens((serial << 24) + local, block)
        prompt += content.tokens((1 << 39) + (serial << 16) + turn, length - len(prompt))  # the last, partial block
        output = max(1, round(call.output_len * self.scale)) if call.output_len else 0
        tags = Tags(client=id, session=id, turn=turn, category="agent", tool=call.tool)
        time = now + call.think_time * self.think_scale if turn else now
        return Arrival(time, prompt, self.sampling(), output, f"{id}.{turn}", tags)

    def on_result(self, request: Request, now: float) -> Iterable[Arrival]:
        id, turn = request.tags.session, request.tags.turn + 1
        if turn < len(self._sessions[id][2]) and request.state is RequestState.FINISHED:
            following = self._call(id, turn, now)
            if len(following.prompt_token_ids) < self._max_model_len:
                return [following]
        return super().on_result(request, now)


def _calls(requests: list[dict[str, Any]]) -> Iterator[Call]:
    for entry in requests:
        if entry["type"] == "subagent":
            yield from _calls(entry["requests"])
        else:
            tool = "tool" if entry.get("stop") == "tool_use" else ""
            yield Call(int(entry["in"]), int(entry["out"]), array("L", entry["hash_ids"]), float(entry.get("think_time", 0.0)), tool)


@hookimpl
def headway_register(registry):
    registry.add("workload", "agents", Agents)
