"""What a run leaves behind so that it can be taken again: one `replay.npz`, with no pickle in it.

readings  float64 [n]           what the run's clock answered, once per turn of the loop and per step
                                that completed; seconds
step      int64 [steps]         its number; steps that only preempted or rejected ran nothing and are left out
start     float64 [steps]       the executor began the step; seconds
end       float64 [steps]       its tokens were on the host; seconds
plans     uint32 [steps, 8]     counts and checksums of what was decided, see PlanDigest
more      int64 [n, 3]          of each request that a step gave several tokens: the step, its place in the
          plan, tokens beyond the first
tokens    int64 [total]         generated tokens, request after request in order of arrival
offsets   int64 [requests + 1]  request i's tokens are tokens[offsets[i] : offsets[i + 1]]
ids       str [requests]        request ids, in order of arrival
arrival   float64 [requests]    seconds
prompt    int64 [requests, 2]   length and checksum of the prompt's tokens
texts     str []                JSON: the requests that hold text, see Said
meta      str []                JSON: format, decision hash, status, seed, limits, executor's caps,
          composition
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from itertools import chain, pairwise
from pathlib import Path
from struct import pack
from types import NoneType
from typing import IO, Any, NamedTuple

from headway import (
    Engine,
    HeadwayError,
    Lists,
    Observer,
    Request,
    RequestOutput,
    RunResult,
    StepColumns,
    StepLog,
    StepPlan,
    whole,
)

from .cost import stored

FORMAT = 4
FILE = "replay.npz"


class ReplayError(HeadwayError):
    """The run went another way than the record, or the record cannot be read."""


class PlanDigest(NamedTuple):
    """What a step decided: four counts that a person understands, and a checksum of each that tells plans
    apart."""

    num_requests: int
    num_tokens: int
    num_blocks: int
    num_preempted: int
    requests: int
    chunks: int
    blocks: int
    preempted: int

    @classmethod
    def of(cls, plan: StepPlan) -> PlanDigest:
        indices = [r.index for r in plan.requests]
        allocated = [x for request, first, blocks in plan.allocated for x in (request.index, first, *blocks)]
        preempted = [r.index for r in plan.preempted]
        num_blocks = sum(len(a.blocks) for a in plan.allocated)
        sums = map(checksum, (indices, [*plan.starts, *plan.lengths], allocated, preempted))
        return cls(len(indices), plan.num_tokens, num_blocks, len(preempted), *sums)

    def differs(self, recorded: PlanDigest) -> str:
        """The first thing that is not as recorded, in words; "" where all is."""
        for what, (count, total) in _COMPARED.items():
            here, then = getattr(self, count), getattr(recorded, count)
            if here != then:
                return f"{here:,} {what} here, {then:,} in the record"
            if getattr(self, total) != getattr(recorded, total):
                return f"as many {what} as in the record ({here:,}), but others"
        return ""


#: In words -> field of the count, field of the checksum; what is compared first comes first.
_COMPARED = {
    "preempted requests": ("num_preempted", "preempted"),
    "planned requests": ("num_requests", "requests"),
    "planned tokens": ("num_tokens", "chunks"),
    "new blocks": ("num_blocks", "blocks"),
}


def checksum(numbers: Sequence[int]) -> int:
    return zlib.crc32(pack(f"{len(numbers)}q", *numbers))


def digests(steps: StepColumns) -> Any:
    """PlanDigest.of every step's plan, as rows."""
    import numpy as np

    numbers, sizes = steps.numbers, steps.allocation_sizes
    blocks = np.concatenate([[0], np.cumsum(sizes.values)])[sizes.offsets]
    counts = (numbers["num_seqs"], numbers["num_tokens"], np.diff(blocks), numbers["num_preempted"])
    sums = map(_checksums, (steps.requests, steps.chunks, steps.allocations, steps.preempted))
    return np.stack([*counts, *sums], axis=1).astype(np.uint32)


def _checksums(lists: Lists) -> Any:
    """`checksum` of each list; they are 64-bit words already."""
    import numpy as np

    words: Any = memoryview(lists.values)  # type: ignore[arg-type]  # numpy's arrays have the protocol, and before Python 3.12 no type
    bounds = pairwise(lists.offsets.tolist())
    return np.array([zlib.crc32(words[a:b]) if a < b else 0 for a, b in bounds], np.int64)


def _more(steps: StepColumns) -> Any:
    """Rows of `more`."""
    import numpy as np

    pairs = steps.more.values.reshape(-1, 2)
    owners = np.repeat(steps.numbers["step"], np.diff(steps.more.offsets) // 2)
    return np.column_stack((owners, pairs)).astype(np.int64)


class Prompt(NamedTuple):
    """What a record knows of a prompt."""

    length: int
    checksum: int

    @classmethod
    def of(cls, request: Request) -> Prompt:
        return cls(request.num_prompt_tokens, zlib.crc32(request.prompt_words()))


class Said(NamedTuple):
    """A request that was a text."""

    id: str
    prompt: str
    prompt_token_ids: list[int]
    answer: str
    text: str | None  # the answer before the stop string that ended it; None where none did
    stop_reason: int | str | None
    refusal: str  # why its tokenizer made no tokens of it

    @classmethod
    def of(cls, output: RequestOutput, tokenizer: Any) -> Said:
        tokens = output.prompt_token_ids
        refusal = output.finish_reason if output.state == "rejected" and not tokens else ""
        answer = tokenizer.answer(tokens, output) if output.output_token_ids else ""
        return cls(output.id, output.prompt or "", tokens, answer, output.text, output.stop_reason, refusal)


@dataclass(frozen=True)
class Record:
    """A recorded run, read into memory."""

    path: Path
    readings: list[float]
    steps: dict[int, tuple[float, float]]  # number of the step -> its start and end, seconds
    plans: dict[int, Any]  # number of the step -> a row of PlanDigest
    more: dict[tuple[int, int], int]  # number of the step, place in its plan -> tokens beyond the first
    tokens: dict[str, list[int]]  # request id -> generated tokens
    arrivals: dict[str, float]  # request id -> seconds
    prompts: dict[str, Prompt]
    said: list[Said]
    meta: dict[str, Any]

    def plan(self, step: int) -> PlanDigest:
        return PlanDigest(*self.plans[step].tolist())

    @property
    def durations(self) -> list[float]:
        """Seconds of each step that ran, in order."""
        return [end - start for start, end in self.steps.values()]

    @classmethod
    def load(cls, path: str | Path, named: str = "executor.path") -> Record:
        """`path` is a record or the run directory that holds one; `named` is the parameter that gave it.
        Raises ReplayError for what is none."""
        import numpy as np

        file = Path(path)
        file = file / FILE if file.is_dir() else file
        if not str(path) or not file.is_file():
            expected = f"expected a run directory with {FILE}, or such a file"
            raise ReplayError(f"{named}={str(path)!r}: {expected}")
        try:
            with np.load(file, allow_pickle=False) as data:
                meta = json.loads(str(data["meta"]))
                if (found := meta.get("format")) != FORMAT:
                    expected = f"expected {FORMAT}: record the run again with this version"
                    raise ReplayError(f"{file}: format {found}, {expected}")
                arrays = {name: data[name] for name in data.files}
                if arrays["plans"].shape[1:] != (len(PlanDigest._fields),):
                    raise ValueError("its plans have another shape")
                rows = {"plans": arrays.pop("plans")}  # a step is 32 bytes so
                return cls._of(file, {name: array.tolist() for name, array in arrays.items()} | rows, meta)
        except _BROKEN as error:
            problem = f"{type(error).__name__}: {error}"
            raise ReplayError(f"{file}: is no record of a run ({problem}): record the run again") from error

    @classmethod
    def _of(cls, file: Path, data: dict[str, Any], meta: dict[str, Any]) -> Record:
        ids, offsets, tokens = data["ids"], data["offsets"], data["tokens"]
        limits = dict(meta["limits"])
        if set(limits) != set(LIMITS) or set(map(type, limits.values())) != {int}:
            raise ValueError(f"its limits are {limits}")
        if not isinstance(meta["facts"], (dict, NoneType)) or not isinstance(meta["derived"], dict):
            raise ValueError("its composition is no table")
        ends = (offsets[0], offsets[-1], len(offsets))
        if offsets != sorted(offsets) or ends != (0, len(tokens), len(ids) + 1):
            raise ValueError("its tokens and its requests do not match")
        if not all(map(math.isfinite, (*data["readings"], *data["start"], *data["end"], *data["arrival"]))):
            raise ValueError("it holds times that are no finite numbers")
        return cls(
            path=file,
            readings=data["readings"],
            steps=dict(zip(data["step"], zip(data["start"], data["end"], strict=True), strict=True)),
            plans=dict(zip(data["step"], data["plans"], strict=True)),
            more={(step, place): count for step, place, count in data["more"]},
            tokens={id: tokens[a:b] for id, a, b in zip(ids, offsets, offsets[1:], strict=False)},
            arrivals=dict(zip(ids, data["arrival"], strict=True)),
            prompts=dict(zip(ids, (Prompt(*row) for row in data["prompt"]), strict=True)),
            said=[Said(*entry) for entry in json.loads(data["texts"])],
            meta={name: meta[name] for name in _META},
        )


LIMITS = (
    "num_blocks",
    "block_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_inflight",
    "max_model_len",
)
_META = (
    "format",
    "status",
    "decision_hash",
    "seed",
    "limits",
    "derived",
    "caps",
    "model",
    "roofline",
    "facts",
)
#: What numpy, zipfile and json raise for a file that is cut, damaged or something else.
_DAMAGED = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError)
_BROKEN = (*_DAMAGED, KeyError, TypeError, AttributeError, IndexError)


class Recorder(Observer):
    """Writes `replay.npz` when the run ends. `facts` is the composition; None for an engine that was built by
    hand, which needs the observers `recording` answers: steps come from a log."""

    def __init__(self, path: str | Path, facts: dict[str, Any] | None = None) -> None:
        self.path, self.facts = Path(path), facts

    def on_start(self, run: Engine) -> None:
        self._engine = run
        run.clock.record()
        self._steps: list[tuple[Any, ...]] = []  # pieces of the columns step, start, end, plans and more
        self._prompts: dict[int, Prompt] = {}  # by index of the request

    def read(self, steps: StepColumns) -> None:
        numbers = steps.numbers
        self._steps.append(
            (
                numbers["step"].copy(),
                numbers["start"].copy(),
                numbers["end"].copy(),
                digests(steps),
                _more(steps),
            )
        )

    def on_requests(self, requests: Sequence[Request]) -> None:
        for r in requests:
            self._prompts[r.index] = Prompt.of(r)

    def close(self, result: RunResult) -> None:
        import numpy as np

        if not self._steps:
            raise ReplayError(
                f"{self.path}: the recorder heard of no step: give the engine the observers of `recording`"
            )
        file = self.path / FILE if self.path.is_dir() else self.path
        outputs = result.outputs
        tokenizer = self._engine.executor.tokenizer
        said = [Said.of(o, tokenizer) for o in outputs if o.prompt is not None and tokenizer is not None]
        offsets = np.cumsum([0, *(len(o.output_token_ids) for o in outputs)], dtype=np.int64)
        tokens = chain.from_iterable(o.output_token_ids for o in outputs)
        data = {
            "readings": np.array(self._engine.clock.readings, np.float64),
            **dict(
                zip(
                    ("step", "start", "end", "plans", "more"),
                    map(np.concatenate, zip(*self._steps, strict=True)),
                    strict=True,
                )
            ),
            "tokens": np.fromiter(tokens, np.int64, int(offsets[-1])),
            "offsets": offsets,
            "ids": np.array([o.id for o in outputs], dtype=np.str_) if outputs else np.zeros(0, "U1"),
            "arrival": np.array([o.arrival_time for o in outputs], np.float64),
            "prompt": np.array([self._prompts[o.index] for o in outputs], np.int64).reshape(-1, 2),
            "texts": np.array(json.dumps(said)),
            "meta": np.array(json.dumps(_meta(self._engine, result) | {"facts": self.facts})),
        }
        with whole(file) as scratch, scratch.open("wb") as out:
            _save(out, data)


def recording(path: str | Path) -> list[Observer]:
    """The observers that record the runs of an engine that was built by hand."""
    recorder = Recorder(path)
    return [StepLog(recorder.read), recorder]


def _save(out: IO[bytes], data: dict[str, Any]) -> None:
    """numpy's `savez_compressed` at the fastest level: a quarter of the time, for a file 8% larger."""
    import numpy as np

    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, values in data.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)


def _meta(engine: Engine, result: RunResult) -> dict[str, Any]:
    caps, config, cost = engine.executor.caps, engine.config, engine.executor.cost_model
    return {
        "format": FORMAT,
        "status": result.status,
        "decision_hash": result.decision_hash,
        "seed": engine.seed,
        "limits": {
            "num_blocks": engine.pool.num_blocks,
            "block_size": engine.pool.block_size,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "max_inflight": engine.max_inflight,
            "max_model_len": engine.max_model_len,
        },
        "derived": engine.derived,
        "caps": {
            "max_model_len": caps.max_model_len,
            "vocab_size": caps.vocab_size,
            "eos_token_ids": sorted(caps.eos_token_ids),
            "placeholders": caps.placeholders,
            "max_inflight": caps.max_inflight,
            "default_inflight": caps.default_inflight,
            "default_token_budget": caps.default_token_budget,
            "tokens_per_step": caps.tokens_per_step,
            "max_drafts": caps.max_drafts,
            "tier_blocks": list(caps.tier_blocks),
        },
        "model": asdict(caps.model)
        if is_dataclass(caps.model) and not isinstance(caps.model, type)
        else None,
        "roofline": stored(cost),
    }
