"""Times every kernel on one GPU, against plain torch and FlashAttention: medians of CUDA-graph replays, and
bytes over time.

    python experiments/bench_kernels.py                     # the table
    python experiments/bench_kernels.py --tune              # attention launch shapes side by side
    python experiments/bench_kernels.py --only decode,store

A graph holds many calls that go round several KV caches, so that what is measured is memory and not the
cache. FlashAttention runs where its package is installed. Caches and tables are random: neither layout nor
values are friendlier than a real run's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plugins.kernels.ops import BatchMetadata
from plugins.kernels.torch import ops as plain
from plugins.kernels.triton import ops as kernels
from plugins.kernels.triton.attention import DecodeShape, PromptShape

DEVICE, DTYPE = "cuda", torch.bfloat16
READ_BANDWIDTH = 4.39e12  # bytes/s, measured on the reference GPU machine
RESULTS: list[dict[str, Any]] = []


def graph_us(call: Callable[[int], Any], calls: int, replays: int) -> tuple[float, float]:
    """Median and spread (largest minus smallest of the middle half) of one call, in microseconds, inside a
    graph of `calls` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    times.sort()
    return statistics.median(times), times[3 * len(times) // 4] - times[len(times) // 4]


def row(what: str, case: str, variant: str, us: float, spread: float, note: str = "") -> None:
    RESULTS.append(
        {
            "what": what,
            "case": case,
            "variant": variant,
            "us": round(us, 2),
            "spread": round(spread, 2),
            "note": note,
        }
    )
    print(f"{what:8} {case:34} {variant:24} {us:9.2f} us  +-{spread:6.2f}  {note}", flush=True)


def attempt(
    what: str,
    case: str,
    variant: str,
    note: Callable[[float], str],
    call: Callable[[int], Any],
    calls: int,
    replays: int = 15,
) -> None:
    try:
        us, spread = graph_us(call, calls, replays)
    except Exception as error:  # a launch shape that does not fit: the other rows still count
        print(
            f"{what:8} {case:34} {variant:24} failed: {type(error).__name__} {str(error)[:120]}", flush=True
        )
        return
    row(what, case, variant, us, spread, note(us))


@dataclass
class Case:
    """One attention batch, on `caches` pairs of caches."""

    name: str
    q: torch.Tensor
    caches: list[tuple[torch.Tensor, torch.Tensor]]
    batch: BatchMetadata
    kv_bytes: float
    flops: float


def attention_case(
    queries: list[int], contexts: list[int], heads: int, kv_heads: int, size: int, block_size: int, name: str
) -> Case:
    blocks_of = [-(-context // block_size) for context in contexts]
    blocks = sum(blocks_of) + 1
    ids = torch.randperm(blocks - 1, device=DEVICE).to(torch.int32) + 1
    tables = torch.zeros(
        len(contexts), max(-(-4096 // block_size), max(blocks_of)), dtype=torch.int32, device=DEVICE
    )
    start = 0
    for i, count in enumerate(blocks_of):
        tables[i, :count] = ids[start : start + count]
        start += count
    bytes_of_cache = blocks * block_size * kv_heads * size * 2
    caches = [
        tuple(torch.randn(blocks, block_size, kv_heads, size, device=DEVICE, dtype=DTYPE) for _ in "kv")
        for _ in range(min(28, max(1, math.ceil(3e8 / (2 * bytes_of_cache)))))
    ]
    batch = BatchMetadata(
        slot_mapping=torch.zeros(sum(queries), dtype=torch.int64, device=DEVICE),
        block_tables=tables,
        cu_seqlens_q=torch.tensor([0, *queries], device=DEVICE).cumsum(0).to(torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=DEVICE),
        max_seqlen_q=max(queries),
        max_seqlen_k=max(contexts),
        block_size=block_size,
    )
    pairs = sum(q * c - q * (q - 1) / 2 for q, c in zip(queries, contexts, strict=True))
    q = torch.randn(sum(queries), heads, size, device=DEVICE, dtype=DTYPE)
    return Case(name, q, caches, batch, sum(contexts) * kv_heads * size * 2 * 2, 4 * heads * size * pairs)  # type: ignore[arg-type]


def flash_attention() -> Callable[..., Any] | None:
    try:
        from plugins.kernels.flash_attn.fa3 import attention
    except ImportError:
        return None
    return attention


def time_attention(
    what: str, case: Case, variants: dict[str, Callable[..., Any]], note: Callable[[Case, float], str]
) -> None:
    calls = max(len(case.caches), 8 if case.kv_bytes > 1e9 or case.flops > 1e12 else 16)
    for name, attention in variants.items():
        case.batch.extra.clear()

        def call(i: int, attention: Callable[..., Any] = attention) -> Any:
            k, v = case.caches[i % len(case.caches)]
            return attention(case.q, k, v, case.batch, case.q.shape[-1] ** -0.5)

        attempt(what, case.name, name, lambda us: note(case, us), call, calls)
    case.batch.extra.clear()


def bandwidth(case: Case, us: float) -> str:
    rate = case.kv_bytes / us / 1e-6
    return f"{rate / 1e12:5.2f} TB/s  {100 * rate / READ_BANDWIDTH:5.1f} %"


def rate(case: Case, us: float) -> str:
    return f"{case.flops / us / 1e-6 / 1e12:6.1f} TFLOP/s"


def mixed_lengths(rows: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(100, 2048, (rows,), generator=generator).tolist()


DECODES = {
    "64 x 4096": [4096] * 64,
    "256 x 1024": [1024] * 256,
    "256 x U(100,2048)": mixed_lengths(256),
    "64 x 1024": [1024] * 64,
    "1 x 1024": [1024],
    "1 x 4096": [4096],
    "256 x 4096": [4096] * 256,
}


def attention_variants(
    role: str, shapes: Sequence[DecodeShape | PromptShape]
) -> dict[str, Callable[..., Any]]:
    """Ours, FlashAttention where it is installed, and ours at other launch shapes. role: "decode" or
    "prompt"."""
    variants: dict[str, Callable[..., Any]] = {"triton": kernels.attention}
    flash = flash_attention()
    if flash is not None:
        variants["flash_attn 3"] = flash
    for shape in shapes:
        variants["/".join(str(x) for x in astuple(shape))] = partial(kernels.attention, **{role: shape})
    return variants


TUNE_DECODE = [
    DecodeShape(64, 3, 4, 3, 4096, 168),
    DecodeShape(64, 3, 4, 3),
    DecodeShape(64, 6, 4, 3, 4096, 168),
    DecodeShape(64, 2, 4, 4),
    DecodeShape(64, 3, 4, 3, 4096),
    DecodeShape(64, 3, 4, 3, 2048),
    DecodeShape(32, 6, 2, 3, 4096, 168),
]
TUNE_PROMPT = [
    PromptShape(128, 64, 8, 4),
    PromptShape(128, 128, 8, 3),
    PromptShape(64, 128, 4, 2),
    PromptShape(128, 32, 8, 4),
    PromptShape(64, 32, 4, 4),
]


def bench_decode(shapes: Sequence[DecodeShape]) -> None:
    variants = attention_variants("decode", shapes)
    for heads, kv_heads, names in (
        (16, 8, DECODES),
        (32, 8, ["64 x 4096", "256 x 1024", "1 x 1024"]),
        (64, 8, ["64 x 4096"]),
    ):
        for name in names:
            for block_size in (16, 256):
                if shapes and block_size == 256 and name != "64 x 4096":
                    continue
                contexts = DECODES[name]
                case = attention_case(
                    [1] * len(contexts),
                    contexts,
                    heads,
                    kv_heads,
                    128,
                    block_size,
                    f"{heads}/{kv_heads} {name} bs{block_size}",
                )
                time_attention("decode", case, variants, bandwidth)
                del case


PROMPTS = {
    "1 x 1024": ([1024], [1024]),
    "16 x 1024": ([1024] * 16, [1024] * 16),
    "2 x 8192": ([8192] * 2, [8192] * 2),
    "2048 after 6144": ([2048], [8192]),
    "255 decodes + 1793": ([1] * 255 + [1793], [1024] * 255 + [1793]),
}


def bench_prompt(shapes: Sequence[PromptShape]) -> None:
    variants = attention_variants("prompt", shapes)
    for heads, kv_heads in ((16, 8), (32, 8)):
        for name, (queries, contexts) in PROMPTS.items():
            case = attention_case(queries, contexts, heads, kv_heads, 128, 16, f"{heads}/{kv_heads} {name}")
            time_attention("prompt", case, variants, rate)


def nothing(us: float) -> str:
    return ""


def bench_store(shapes: Sequence[Any]) -> None:
    kv_heads, size = 8, 128
    for tokens in (1, 256, 2048, 16384):
        k_cache, v_cache = (torch.randn(2048, 16, kv_heads, size, device=DEVICE, dtype=DTYPE) for _ in "kv")
        slots = torch.randperm(2048 * 16, device=DEVICE)[:tokens]
        qkv = [torch.randn(tokens, 32, size, device=DEVICE, dtype=DTYPE) for _ in range(4)]

        def index_put(i: int) -> None:
            _, k, v = qkv[i % 4].split((16, 8, 8), dim=1)
            k_cache.view(-1, kv_heads, size)[slots] = k
            v_cache.view(-1, kv_heads, size)[slots] = v

        def store(i: int) -> None:
            _, k, v = qkv[i % 4].split((16, 8, 8), dim=1)
            kernels.store_kv(k, v, k_cache, v_cache, slots)

        attempt("store", f"{tokens} tokens", "torch index_put", nothing, index_put, 8)
        moved = tokens * kv_heads * size * 2 * 2 * 2
        attempt(
            "store",
            f"{tokens} tokens",
            "triton",
            lambda us, moved=moved: f"{moved / us / 1e6:5.2f} TB/s",
            store,
            8,
        )


def bench_layers(shapes: Sequence[Any]) -> None:
    """Qwen3-0.6B's shapes (hidden 1024, 16/8 heads of 128, intermediate 3072) and Qwen3-8B's (4096, 32/8,
    12288)."""
    for hidden, heads, kv_heads, wide in ((1024, 16, 8, 3072), (4096, 32, 8, 12288)):
        for tokens in (1, 256, 4096):
            case = f"{tokens} tokens, hidden {hidden}"
            x = torch.randn(tokens, hidden, device=DEVICE, dtype=DTYPE)
            residual = torch.randn_like(x)
            weight, head_weight = (
                torch.randn(hidden, device=DEVICE, dtype=DTYPE),
                torch.randn(128, device=DEVICE, dtype=DTYPE),
            )
            gate_up = torch.randn(tokens, 2 * wide, device=DEVICE, dtype=DTYPE)
            qkv = torch.randn(tokens, (heads + 2 * kv_heads) * 128, device=DEVICE, dtype=DTYPE)
            positions, cos_sin = (
                torch.randint(4096, (tokens,), device=DEVICE),
                torch.rand(4096, 128, device=DEVICE),
            )
            k_cache, v_cache = (torch.zeros(512, 16, kv_heads, 128, device=DEVICE, dtype=DTYPE) for _ in "kv")
            slots = torch.randperm(512 * 16, device=DEVICE)[:tokens]
            fused = (
                qkv,
                head_weight,
                head_weight,
                1e-6,
                positions,
                cos_sin,
                k_cache,
                v_cache,
                slots,
                heads,
                kv_heads,
            )
            for name, ops in (("torch", plain), ("triton", kernels)):
                attempt("norm", case, name, nothing, lambda i, o=ops: o.rms_norm(x, weight, 1e-6), 8)
                attempt(
                    "add+norm",
                    case,
                    name,
                    nothing,
                    lambda i, o=ops: o.add_rms_norm(x, residual, weight, 1e-6),
                    8,
                )
                attempt("silu*mul", case, name, nothing, lambda i, o=ops: o.silu_and_mul(gate_up), 8)
                attempt("qk+rope", case, name, nothing, lambda i, o=ops: o.qk_norm_rope_store(*fused), 8)


def bench_products(shapes: Sequence[Any]) -> None:
    """A layer's four products with the norms and the activation between them, on Qwen3-0.6B's shapes: cuBLAS
    and separate kernels, and the products that Triton takes. The weights of 16 layers in turn, so that they
    come from memory."""
    hidden, heads, wide, projected = 1024, 2048, 3072, 4096
    shapes_of = ((hidden, heads), (2 * wide, hidden), (hidden, wide), (projected, hidden))
    layers = [
        [torch.randn(n, k, device=DEVICE, dtype=DTYPE) * k**-0.5 for n, k in shapes_of] for _ in range(16)
    ]
    weight = torch.ones(hidden, device=DEVICE, dtype=DTYPE)
    for rows in (1, 4, 16, 64, 128, 192, 256):
        x, residual = (
            torch.randn(rows, heads, device=DEVICE, dtype=DTYPE),
            torch.randn(rows, hidden, device=DEVICE, dtype=DTYPE),
        )

        def layer(i: int, linear: Any, parts: Any, gated: Any) -> torch.Tensor:
            o, gate_up, down, qkv = layers[i % 16]
            h, _ = kernels.add_rms_norm(parts(x, o, None), residual, weight, 1e-6)
            h, _ = kernels.add_rms_norm(parts(gated(h, gate_up, None), down, None), residual, weight, 1e-6)
            return linear(h, qkv, None)

        library = partial(
            layer,
            linear=plain.linear,
            parts=plain.linear,
            gated=lambda h, w, b: kernels.silu_and_mul(plain.linear(h, w, b)),
        )
        attempt("layer", f"{rows} rows", "cuBLAS", nothing, library, 16)
        ours = partial(layer, linear=kernels.linear, parts=kernels.linear_parts, gated=kernels.gated_linear)
        attempt("layer", f"{rows} rows", "triton", nothing, ours, 16)


def bench_sample(shapes: Sequence[Any]) -> None:
    for rows in (1, 256):
        logits = [torch.randn(rows, 151936, device=DEVICE, dtype=DTYPE) * 3 for _ in range(2)]
        temperature = torch.full((rows,), 0.6, device=DEVICE)
        seeds, positions = torch.arange(rows, device=DEVICE), torch.arange(rows, device=DEVICE)
        limits = (
            torch.full((rows,), 20, dtype=torch.int32, device=DEVICE),
            torch.full((rows,), 0.95, device=DEVICE),
            torch.zeros(rows, device=DEVICE),
        )
        for case, given in (
            ("greedy", (None, None, None, None)),
            ("temperature", (temperature, None, None, None)),
            ("top-k, top-p", (temperature, *limits)),
        ):
            for name, ops in (("torch", plain), ("triton", kernels)):
                attempt(
                    "sample",
                    f"{rows} x 151936 {case}",
                    name,
                    nothing,
                    lambda i, o=ops, g=given: o.sample(logits[i % 2], *g, seeds, positions),
                    2,
                    5,
                )


TUNE: dict[str, Sequence[Any]] = {"decode": TUNE_DECODE, "prompt": TUNE_PROMPT}
PARTS: dict[str, Callable[[Sequence[Any]], None]] = {
    "decode": bench_decode,
    "prompt": bench_prompt,
    "store": bench_store,
    "layers": bench_layers,
    "products": bench_products,
    "sample": bench_sample,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated")
    parser.add_argument(
        "--tune", action="store_true", help="other launch shapes of the attention kernels too"
    )
    parser.add_argument("--json", type=Path, help="write the rows there")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_kernels needs a GPU: torch.cuda.is_available() is false here.")
    torch.manual_seed(0)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; bandwidth in % of "
        f"{READ_BANDWIDTH / 1e12} TB/s"
    )
    for name in args.only.split(","):
        PARTS[name](TUNE.get(name, ()) if args.tune else ())
    if args.json:
        args.json.write_text(json.dumps(RESULTS, indent=1))


if __name__ == "__main__":
    main()
