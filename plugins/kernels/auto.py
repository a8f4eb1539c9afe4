"""The fastest kernels that can run here, operation by operation.

The order was measured on H100s and H200s (docs/kernels.md): FlashAttention is ahead in prompts, Triton in decodes and in everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from headway import ConfigError, hookimpl

from .compose import KernelChoice, check


@dataclass
class AutoKernels(KernelChoice):
    """The fastest kernels that can run here: FlashAttention for prompts and Triton for the rest, in CUDA graphs; plain torch on a CPU.

    A field that is given is used as it is; None is what suits the device, the dtype, the head size and the block size."""

    attention: str | None = None
    linear: str | None = None
    norm: str | None = None
    rope: str | None = None
    activation: str | None = None
    store: str | None = None
    sampling: str | None = None
    batch: str | None = None
    cuda_graphs: bool | None = None

    plugin_name = "auto"

    def settled(
        self, backends: Callable[[str], KernelChoice], device: str, dtype: str, head_size: int, block_size: int
    ) -> tuple[KernelChoice, list[str]]:
        """The choice with every field set, and what was left out and why."""
        notes: list[str] = []

        def able(name: str) -> bool:
            try:
                role = backends(name)
                role.operations(device)  # says which package is missing
                check(name, role.caps, device, dtype, head_size, block_size)
            except ConfigError as error:
                notes.append(f"no {name}: {error}")
                return False
            return True

        rest, attention = "torch", "torch"
        if device == "cuda":
            rest = attention = "triton" if able("triton") else "torch"
            attention = "flash_attn" if able("flash_attn") else attention
        given = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        settled = KernelChoice(**{f.name: rest for f in fields(self) if f.name not in ("decode", "cuda_graphs")})
        settled.attention, settled.cuda_graphs = attention, rest == "triton"
        for name, value in given.items():
            setattr(settled, name, value)
        if "attention" not in given and settled.decode is None and attention != rest:
            settled.decode = rest
        settled.plugin_name = self.plugin_name
        return settled, notes


@hookimpl
def headway_register(registry):
    registry.add("kernels", "auto", AutoKernels)
