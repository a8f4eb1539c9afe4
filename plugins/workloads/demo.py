"""What `python run.py` runs: a small workload in which scheduling and caching matter."""

from __future__ import annotations

from dataclasses import dataclass

from headway import Registry, hookimpl, param

from .pace import LONGEST, PROCESSES
from .shared_prefix import SharedPrefix


@dataclass
class Demo(SharedPrefix):
    """Three clients of unlike size, prompts of unlike length that share beginnings, Poisson, a little faster
    than two CPU cores serve."""

    arrival: str = param(
        "poisson", choices=PROCESSES, doc="closed: `concurrency` clients that wait for each answer"
    )
    rate: float = param(100.0, min=1e-6, max=1e9, unit="requests a second", doc="uniform, poisson and gamma")
    num_requests: int = param(40, min=1, max=10_000_000)
    input_len: int | list[int] = param([32, 320], min=1, max=LONGEST, unit="tokens")
    output_len: int | list[int] = param([4, 48], min=1, max=LONGEST, unit="tokens")
    groups: int = param(4, min=1, max=1_000_000, doc="distinct prefixes")
    share_requests: float = param(0.75, min=0, max=1, doc="share of the requests that belong to a group")
    share_prompt: float = param(0.6, min=0, max=1, doc="share of a prompt that is its group's prefix")
    clients: int | None = param(3, min=1, max=1_000_000, doc="requests are dealt to so many clients")
    client_skew: float | None = param(1.0, min=0, max=100, doc="the k-th client has a share of 1 / k ** skew")

    def __post_init__(self) -> None:
        self.groups = min(self.groups, self.num_requests)  # workload.num_requests=1 alone is right
        super().__post_init__()


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("workload", "demo", Demo)
