"""Runs cases in another process, under another hash seed, clock or chance: `python -m core.testing.worker`
speaks JSON lines.

The same case must lead to the same decisions in every one of them.
"""

from __future__ import annotations

import datetime
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .case import Case

#: Name -> (PYTHONHASHSEED, clock, chance). Each differs from the first in one thing that no decision may rest
#: on.
VARIANTS = {
    "base": ("0", 1.0, 0),
    "process": ("0", 1.0, 0),  # nothing but addresses and what the operating system hands out
    "hash seed": ("1", 1.0, 0),
    "hash seed 2": ("2", 1.0, 0),
    "clock": ("0", 13.7, 0),
    "global random": ("0", 1.0, 1),
}


@dataclass(frozen=True)
class Answer:
    decision_hash: str
    decisions: list[str]
    failure: str


class Worker:
    """One such process; `ask` sends a case, `answer` waits for its result, so that several can work at
    once."""

    def __init__(self, variant: str, modules: Sequence[str] = ()) -> None:
        hash_seed, clock, chance = VARIANTS[variant]
        root = Path(__file__).resolve().parent.parent.parent
        path = os.pathsep.join(p for p in (str(root), os.environ.get("PYTHONPATH", "")) if p)
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
        order = json.dumps({"modules": list(modules), "clock": clock, "chance": chance})
        command = [sys.executable, "-m", "core.testing.worker", order]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def ask(self, words: Sequence[str], case: Case) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([list(words), case.to_json()]) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"a process of the kit ended with exit code {self._process.wait()}: its error is above"
            )
        return Answer(*json.loads(line))

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._process.stdout.close()


class Workers:
    """One process of each variant, for any number of compositions. Close it, or use it in a `with`."""

    def __init__(self, modules: Sequence[str] = ()) -> None:
        self._workers = {variant: Worker(variant, modules) for variant in VARIANTS}

    def run(self, words: Sequence[str], case: Case, variants: Iterable[str] = VARIANTS) -> dict[str, Answer]:
        """The case in each of these processes, at the same time."""
        asked = {variant: self._workers[variant] for variant in variants}
        for worker in asked.values():
            worker.ask(words, case)
        return {variant: worker.answer() for variant, worker in asked.items()}

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class FakeTime:
    """Every clock of the standard library, replaced: the same readings in each process, or `pace` times as
    fast from another start."""

    def __init__(self, pace: float) -> None:
        self.pace, self._reading = pace, 1.7e9 * pace

    def seconds(self) -> float:
        self._reading += 0.001 * self.pace
        return self._reading

    def install(self) -> None:
        for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time"):
            setattr(time, name, self.seconds)
            setattr(time, f"{name}_ns", lambda: int(self.seconds() * 1e9))
        seconds = self.seconds

        class FakeDatetime(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return cls.fromtimestamp(seconds() % 4e9, tz)

            @classmethod
            def utcnow(cls) -> Any:
                return cls.fromtimestamp(seconds() % 4e9)

            @classmethod
            def today(cls) -> Any:
                return cls.now()

        datetime.datetime = FakeDatetime  # type: ignore[misc]


def main() -> None:
    order = json.loads(sys.argv[1])
    FakeTime(order["clock"]).install()  # before any plugin is imported: `from time import time` gets it too

    from .case import Case
    from .subject import Subject
    from .trial import Trial

    answers = sys.stdout
    sys.stdout = sys.stderr  # a plugin that prints does not disturb the protocol
    subjects: dict[tuple[str, ...], Subject] = {}
    for line in sys.stdin:
        words, case = json.loads(line)
        subject = subjects.get(tuple(words)) or subjects.setdefault(
            tuple(words), Subject(tuple(words), tuple(order["modules"]))
        )
        random.seed(order["chance"])
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(order["chance"])
        outcome = Trial(Case.from_json(case), subject.roles).run()
        failure = outcome.failure.message if outcome.failure else ""
        print(
            json.dumps([outcome.decision_hash, [str(d) for d in outcome.decisions], failure]),
            file=answers,
            flush=True,
        )


if __name__ == "__main__":
    main()
