"""The KV cache: how much fits, and where it lives. Sizes are read off the model's layers, which a parallel
plan may have cut."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from headway import ConfigError, EngineConfig, ModelShape, ParallelConfig, check_fits

from ...kernels.ops import BatchMetadata

if TYPE_CHECKING:
    from ...kernels.compose import Kernels
    from ...models.layers import Attention, CausalLM, KVCache


def check_blocks(
    engine: EngineConfig,
    shape: ModelShape,
    parallel: ParallelConfig,
    device: torch.device,
) -> None:
    """Raises ConfigError for more KV blocks than the device has memory for, were it empty."""
    if engine.num_blocks is None:
        return
    need = engine.num_blocks * engine.block_size * shape.kv_bytes_per_token
    asked = (
        f"engine.num_blocks={engine.num_blocks}: a KV cache of so many blocks of {engine.block_size} tokens"
    )
    if device.type == "cpu":  # ranks share its memory
        check_fits(need, asked, "lower it, or leave it unset to take what fits")
        return
    need, total = need // parallel.world_size, torch.cuda.get_device_properties(device).total_memory
    if need > total:
        sizes = f"takes {need / 2**30:,.1f} GiB, {device} has {total / 2**30:,.1f} GiB"
        raise ConfigError(f"{asked} {sizes}: lower it, or leave it unset to take what fits")


def bytes_per_token(model: CausalLM) -> int:
    """KV bytes of one token in all layers that this rank holds."""
    attentions = [layer.self_attn for layer in model.model.decoder_layers]
    return sum(2 * a.num_kv_heads * a.head_dim * a.o_proj.weight.element_size() for a in attentions)


def allocate_cache(model: CausalLM, num_blocks: int, block_size: int, device: torch.device) -> list[KVCache]:
    """Keys and values of each layer, [num_blocks, block_size, K, D] in the model's dtype. `num_blocks`
    includes the reserved one."""
    if device.type == "cpu":
        check_fits(
            num_blocks * block_size * bytes_per_token(model),
            f"a KV cache of {num_blocks - 1} blocks of {block_size} tokens",
            "lower engine.num_blocks or executor.kv_cache_gb",
        )
    try:
        return [
            _layer_cache(layer.self_attn, num_blocks, block_size, device)
            for layer in model.model.decoder_layers
        ]
    except (torch.OutOfMemoryError, MemoryError):
        raise ConfigError(
            f"{num_blocks} KV blocks of {block_size} tokens take "
            f"{num_blocks * block_size * bytes_per_token(model) / 2**30:.1f} GiB, "
            f"more than {device} has left: lower engine.num_blocks, or leave it unset to take what fits"
        ) from None


def host_cache(model: CausalLM, num_blocks: int, block_size: int, device: torch.device) -> list[KVCache]:
    """A tier of KV blocks in this machine's memory, laid out like the device's; without blocks there is
    none."""
    if not num_blocks:
        return []
    need = num_blocks * block_size * bytes_per_token(model)
    check_fits(
        need,
        f"executor.host_blocks={num_blocks}: a tier of so many KV blocks of {block_size} tokens",
        "lower it",
    )
    host = torch.device("cpu")
    caches = [
        _layer_cache(layer.self_attn, num_blocks, block_size, host) for layer in model.model.decoder_layers
    ]
    if device.type == "cuda":  # page-locked, so that nobody waits for a copy
        return [(keys.pin_memory(), values.pin_memory()) for keys, values in caches]
    return caches


def _layer_cache(attention: Attention, num_blocks: int, block_size: int, device: torch.device) -> KVCache:
    size = (2, num_blocks, block_size, attention.num_kv_heads, attention.head_dim)
    keys, values = _zeros(size, attention.o_proj.weight.dtype, device)
    return keys, values


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU the system hands out zeroed pages as they are touched, so that a small run does not pay for a
    large cache."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(size) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(size)


@torch.inference_mode()
def kv_bytes_free(
    model: CausalLM, kernels: Kernels, device: torch.device, engine: EngineConfig, utilization: float
) -> int:
    """Bytes left of `utilization` of the GPU after the weights and the largest step, which is run once to
    measure it.

    Raises ConfigError when that step alone does not fit."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    before = torch.cuda.memory_reserved(device)
    try:
        _largest_step(model, kernels, device, engine)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"out of memory in a step of {engine.max_num_batched_tokens} tokens and {engine.max_num_seqs} "
            f"requests on {device}: "
            "lower engine.max_num_batched_tokens or engine.max_num_seqs, or use a smaller model"
        ) from None
    peak = torch.cuda.max_memory_reserved(device) - before
    torch.cuda.empty_cache()
    used = total - free  # by weights, other processes and the CUDA context
    left = int(total * utilization) - used - peak
    if left < engine.block_size * bytes_per_token(model):
        raise ConfigError(
            f"no memory for KV blocks on {device}: {total / 2**30:.1f} GiB x {utilization} less "
            f"{used / 2**30:.1f} GiB in use and "
            f"{peak / 2**30:.1f} GiB for a step. Raise executor.gpu_memory_utilization, lower "
            "engine.max_num_batched_tokens, or use a smaller model"
        )
    return left


def _largest_step(model: CausalLM, kernels: Kernels, device: torch.device, engine: EngineConfig) -> None:
    """Prompts that fill the step's budget, and a token sampled with every filter for as many requests as may
    run."""
    shape, size = model.spec.shape, engine.block_size
    longest = min(engine.max_model_len or shape.max_position_embeddings, shape.max_position_embeddings)
    total = engine.max_num_batched_tokens
    lengths = [longest] * (total // longest) + ([total % longest] if total % longest else [])
    width = -(-max(lengths) // size)
    # one for all layers: its contents do not matter
    cache = _layer_cache(model.model.decoder_layers[0].self_attn, width, size, device)
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0)
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])
    batch = BatchMetadata(
        slot_mapping=positions,
        block_tables=torch.arange(width, dtype=torch.int32, device=device).repeat(len(lengths), 1),
        cu_seqlens_q=bounds.int(),
        context_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        max_seqlen_q=max(lengths),
        max_seqlen_k=max(lengths),
        block_size=size,
    )
    hidden = model(torch.zeros_like(positions), positions, [cache] * len(model.model.layers), batch)
    rows = min(engine.max_num_seqs, engine.max_num_batched_tokens)
    logits = model.compute_logits(hidden[:rows])
    ones = torch.ones(len(logits), device=device)
    kernels.sample(logits, ones, ones.int() * 8, ones * 0.9, ones * 0.1, ones.long(), ones.long())
