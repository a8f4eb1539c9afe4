"""What the kernels ask about a device, once for each: the driver takes its time to answer."""

from __future__ import annotations

from functools import cache

import torch


@cache
def multiprocessors(device: torch.device) -> int:
    # 4: Triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def is_hopper(device: torch.device) -> bool:
    """Or newer: compute capability 9."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
