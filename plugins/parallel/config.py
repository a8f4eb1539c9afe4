"""What the `parallel` node says beside the numbers of ranks: how they talk, and for how long they wait."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from headway import ParallelConfig, param


@dataclass
class MeshConfig(ParallelConfig):
    """Tensor and pipeline parallel ranks in processes of their own, over NCCL, gloo or mapped memory."""

    all_reduce: str = param(
        "auto",
        choices=("auto", "library", "symmetric"),
        doc="library: the device's own collectives; symmetric: GPUs of one host read each other's memory; "
        "auto: symmetric where they can",
    )
    overlap_tokens: int = param(
        2048,
        min=0,
        max=2**31 - 1,
        unit="tokens",
        doc="steps with at least this many use sequence parallelism; 0 disables it",
    )
    timeout: float = param(
        15.0,
        above=0,
        max=1e6,
        unit="seconds",
        doc="without progress of a step after which a rank is taken to hang",
    )
    port: int = param(
        0,
        min=0,
        max=65535,
        doc="where ranks of torchrun's reach rank 0; 0: any free one. Ranks that one command starts need "
        "none",
    )

    @classmethod
    def of(cls, parallel: ParallelConfig) -> MeshConfig:
        """With the defaults of what it does not say."""
        return parallel if isinstance(parallel, cls) else cls(**asdict(parallel))
