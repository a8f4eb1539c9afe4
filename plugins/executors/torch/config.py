"""What the real engine is told, on each of its ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TorchConfig:
    """The parameters of TorchExecutor, which has their ranges and says what they mean."""

    device: str = "auto"
    gpu_memory_utilization: float = 0.9
    kv_cache_gb: float | None = None
    profile: bool = False
    host_blocks: int = 0
