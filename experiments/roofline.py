"""What one GPU allows at best: its measured rates, and the floor that they set for nano-vLLM's benchmark."""

from __future__ import annotations

import statistics
from typing import Any

QWEN3 = {
    "architecture": "Qwen3ForCausalLM",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "dtype": "bfloat16",
}
SHAPES = {
    "0.6B": QWEN3
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "8B": QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}


def machine_rates() -> dict[str, float]:
    """Bytes/s that a reduction reads, FLOP/s of a large bf16 product, on random data."""
    import torch

    def seconds(call: Any) -> float:
        for _ in range(3):
            call()
        times = []
        for _ in range(10):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)

    data = torch.randn(2**31, device="cuda", dtype=torch.bfloat16)
    words = data.view(torch.int32)
    read = data.nbytes / seconds(lambda: words.sum(dtype=torch.int32))
    target = torch.empty_like(data)
    copy = 2 * data.nbytes / seconds(lambda: target.copy_(data))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return {
        "read": read,
        "copy": copy,
        "bandwidth": max(read, copy),
        "flops": 2 * 8192**3 / seconds(lambda: a @ b),
    }


def floor(shape: dict[str, Any], rates: dict[str, float]) -> float:
    """Seconds that the requests of A and B take at least: prompts at the matrix rate, then one step a token,
    each at the larger of reading weights and KV once and its FLOPs."""
    from headway import ModelShape
    from plugins.workloads.nano_bench import requests

    model = ModelShape(**shape)
    prompts, lengths = requests()
    sizes = [len(p) for p in prompts]
    flops = sum(
        model.linear_flops_per_token * n
        + model.attention_flops_per_pair * n * (n + 1) // 2
        + model.head_flops
        for n in sizes
    )
    total = flops / rates["flops"]
    for done in range(1, max(lengths)):
        contexts = [size + done for size, length in zip(sizes, lengths, strict=True) if length > done]
        moved = (
            model.num_hidden_layers * model.layer_parameters + model.embedding_parameters
        ) * model.dtype_bytes
        moved += sum(contexts) * model.kv_bytes_per_token
        total += max(moved / rates["bandwidth"], sum(map(model.flops_per_token, contexts)) / rates["flops"])
    return total
