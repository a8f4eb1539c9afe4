"""All-reduce over memory that the GPUs of a host map into each other (torch's symmetric memory), instead of NCCL's.

The product before the all-reduce is written straight into such memory and summed there in two shots: each rank adds up its part of
every peer's buffer, then fetches the other parts. At the sizes of a decode step NCCL is bound by latency and this is not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from headway import ConfigError


class SymmetricReduce:
    """Two buffers in turn, so that a result lives until the next but one all-reduce: a layer's two never meet."""

    def __init__(self, group: Any, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        """Room for [rows, columns]. Every rank of `group` calls this at once. Raises ConfigError where GPUs cannot map each other's memory."""
        import torch.distributed._symmetric_memory as symmetric

        self._columns, self._group, self._next = columns, group.group_name, 0
        try:
            self._buffers = [symmetric.empty(rows * columns, dtype=dtype, device=device) for _ in range(2)]
            self._handles = [symmetric.rendezvous(buffer, self._group) for buffer in self._buffers]
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"parallel.all_reduce=symmetric: {device} cannot map its peers' memory ({reason}); set it to library") from error
        dist.barrier(group=group)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, K], weight [N, K] -> the sum of x @ weight.T over the ranks, [T, N]. Valid until the next call but one."""
        buffer = self._buffers[self._next]
        self._next ^= 1
        flat = buffer[: len(x) * self._columns]
        product = flat.view(len(x), self._columns)
        torch.mm(x, weight.t(), out=product)
        torch.ops.symm_mem.two_shot_all_reduce_(flat, "sum", self._group)
        return product
