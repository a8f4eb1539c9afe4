"""Headway's own GPU kernels, written in Triton."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from headway import ConfigError, Registry, hookimpl

from ..compose import FUSED, GROUPS, GpuChoice
from ..ops import KernelCaps


@dataclass
class TritonKernels(GpuChoice):
    """Triton kernels for every operation, paged attention included; needs a GPU."""

    plugin_name = "triton"
    caps = KernelCaps(
        devices=frozenset(("cuda",)),
        dtypes=frozenset(("float32", "bfloat16", "float16")),
        head_sizes=frozenset((16, 32, 64, 80, 96, 128, 256)),
        graph_safe=True,
        mixed_graphs=True,
        ops=frozenset((*(op for ops in GROUPS.values() for op in ops), *FUSED)),
    )

    def operations(self, device: str) -> Any:
        if importlib.util.find_spec("triton") is None:
            raise ConfigError(
                "kernels=triton: the package triton is not installed. `pip install triton` (Linux), or set "
                "kernels=torch."
            )
        from . import ops

        return ops


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("kernels", "triton", TritonKernels)
