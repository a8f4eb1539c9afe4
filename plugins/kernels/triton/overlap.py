"""Programmatic dependent launch (Hopper and newer): a kernel's programs start while the kernel before them
still runs, and wait where they first touch what it wrote. What hides in the meantime is the launch itself,
and reads that depend on nobody, such as weights.

Every kernel that is launched this way waits before it ends, so a kernel's end implies the end of all before
it.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .device import is_hopper

NO_OVERLAP = {"PDL": False}


@cache
def overlap(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel with a constexpr PDL."""
    return {"PDL": True, "launch_pdl": True} if is_hopper(device) else NO_OVERLAP


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


@triton.jit
def fetch(pointers):
    """Asks for the cache lines at these addresses without waiting for them. Harmless where the kernel before
    still writes there: they come into the second-level cache, which all see."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
