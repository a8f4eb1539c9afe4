"""torch's threads on a CPU that others use too: they sleep while they wait, and are no more than the cores we
are given."""

from __future__ import annotations

import math
import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of this container: microseconds a period or "max", and the period


def wait_asleep() -> None:
    """OpenMP's threads spin for milliseconds after every operation; where cores are shared, they spin in each
    other's way.

    Read when torch is loaded, so this comes before. What the user has set stays; ranks inherit it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def cores() -> int:
    """Cores that this process may use: its affinity, and its container's quota where there is one."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text(encoding="ascii").split()
        return max(1, min(own, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no container, or no limit
        return own


def limit_threads() -> None:
    """No more threads than cores, unless the user has said how many."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ and (own := cores()) < torch.get_num_threads():
        torch.set_num_threads(own)
