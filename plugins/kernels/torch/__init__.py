"""The reference kernels: plain torch, every operation, every device and dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headway import Registry, hookimpl

from ..compose import GROUPS, KernelChoice
from ..ops import KernelCaps


@dataclass
class TorchKernels(KernelChoice):
    """Plain torch for every operation: the reference, on a CPU or a GPU."""

    plugin_name = "torch"
    caps = KernelCaps(
        devices=frozenset(("cpu", "cuda")),
        dtypes=frozenset(("float32", "bfloat16", "float16", "float64")),
        graph_safe=True,
        ops=frozenset(op for ops in GROUPS.values() for op in ops) | {"qk_norm_rope_store", "sample_part"},
    )

    def operations(self, device: str) -> Any:
        from . import ops

        return ops


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("kernels", "torch", TorchKernels)
