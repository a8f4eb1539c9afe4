"""Kernels that misbehave on one rank after some calls of attention, as a plugin's module."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from headway import hookimpl
from plugins.kernels.torch import TorchKernels


@dataclass
class FaultyKernels(TorchKernels):
    plugin_name = "faulty"
    attention: str = "faulty"
    fault: str = "raise"  # or "hang"
    rank: int = 1
    calls: int = 30

    def operations(self, device: str) -> Any:
        import torch.distributed as dist

        from plugins.kernels.torch import ops

        left = [self.calls]

        def attention(*args: Any) -> Any:
            if dist.get_rank() == self.rank:
                left[0] -= 1
            if left[0] < 0:
                if self.fault == "raise":
                    raise ValueError("a bug in a kernel")
                time.sleep(600)
            return ops.attention(*args)

        return SimpleNamespace(
            **{name: getattr(ops, name) for name in self.caps.ops} | {"attention": attention}
        )


@hookimpl
def headway_register(registry):
    registry.add("kernels", "faulty", FaultyKernels)
