"""What this machine can hold, so that what cannot fit is refused before memory is taken."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from ..errors import ConfigError

GIB = 1 << 30
_CGROUP = Path("/sys/fs/cgroup/memory.max")  # of a container


@cache
def host_memory() -> int | None:
    """Bytes that this process may use; None where the system does not say."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        return min(total, int(_CGROUP.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return total


def check_fits(need: int, what: str, mend: str) -> None:
    """Raises ConfigError when `what`, which takes `need` bytes, cannot fit into this machine's memory; `mend`
    says what to do."""
    if (total := host_memory()) is not None and need > total:
        has = f"this machine has {total / GIB:,.1f} GiB"
        raise ConfigError(f"{what} needs about {need / GIB:,.1f} GiB, {has}: {mend}")
