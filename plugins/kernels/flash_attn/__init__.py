"""FlashAttention's paged attention (Dao et al., 2022; FlashAttention-3, Shah et al., 2024), from the packages
its authors publish.

The values behind a row's end, in its last block, are multiplied by probabilities of 0: they must be finite,
so a KV cache that these kernels read starts as zeros.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import Any

from headway import ConfigError, Registry, hookimpl

from ..compose import GpuChoice
from ..ops import KernelCaps


@dataclass
class FlashAttnKernels(GpuChoice):
    """FlashAttention for attention, Triton for the other operations; needs a GPU and the package
    flash_attn_interface or flash_attn."""

    attention: str = "flash_attn"

    plugin_name = "flash_attn"
    caps = KernelCaps(
        devices=frozenset(("cuda",)),
        dtypes=frozenset(("bfloat16", "float16")),
        head_sizes=frozenset((32, 64, 80, 96, 112, 128, 160, 192, 256)),
        block_size_multiple=16,
        graph_safe=True,
        mixed_graphs=True,
        ops=frozenset(("attention",)),
    )

    def operations(self, device: str) -> Any:
        """FlashAttention-3 where it is installed and the GPU is a Hopper; else FlashAttention-2, whose blocks
        are multiples of 256."""
        found = [
            name
            for name in ("flash_attn_interface", "flash_attn")
            if importlib.util.find_spec(name) is not None
        ]
        if not found:
            raise ConfigError(
                "kernels.attention=flash_attn: neither flash_attn_interface (FlashAttention-3) nor "
                "flash_attn is installed. "
                "`pip install flash-attn --no-build-isolation`, or set kernels.attention=triton."
            )
        if device != "cuda":
            raise ConfigError(
                f"kernels.attention=flash_attn runs on cuda, not on {device}. Set kernels=torch."
            )
        import torch

        major, minor = torch.cuda.get_device_capability()
        if found[0] == "flash_attn_interface" and major == 9:
            from . import fa3

            return fa3
        if "flash_attn" in found and major >= 8:
            from . import fa2

            self.caps = replace(type(self).caps, block_size_multiple=256)
            return fa2
        raise ConfigError(
            f"kernels.attention=flash_attn: {' and '.join(found)} cannot run on a GPU of compute capability "
            f"{major}.{minor} "
            "(FlashAttention-3 needs 9.x, FlashAttention-2 at least 8.0). Set kernels.attention=triton."
        )


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("kernels", "flash_attn", FlashAttnKernels)
