"""Jobs on the GPUs of a machine: one after the other, or as many at once as there are cards, each on its
own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def on_cards(jobs: Mapping[str, Callable[[str], T]], gpus: str) -> Iterator[tuple[str, T]]:
    """What each job answers, in their order. A job is given the number of a card that no other one uses;
    gpus: such numbers, as 0,1."""
    numbers = gpus.split(",")
    free: SimpleQueue[str] = SimpleQueue()
    for number in numbers:
        free.put(number)

    def run(job: Callable[[str], T]) -> T:
        number = free.get()
        try:
            return job(number)
        finally:
            free.put(number)

    with ThreadPoolExecutor(len(numbers)) as pool:
        started = {name: pool.submit(run, job) for name, job in jobs.items()}
        for name, future in started.items():
            yield name, future.result()
