"""Programmatic dependent launch (Hopper and newer): a kernel's programs start while the kernel before them still runs, and wait
where they first touch what it wrote. What hides in the meantime is the launch itself, and reads that depend on nobody, such as weights.

Every kernel that is launched this way waits before it ends, so a kernel's end implies the end of all before it.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def overlap(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel with a constexpr PDL."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@triton.jit
def release(PDL: tl.constexpr):
    """The next kernel may start."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """What the kernels before wrote is there from here on."""
    if PDL:
        gdc_wait()
