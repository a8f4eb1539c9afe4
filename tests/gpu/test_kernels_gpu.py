"""Every kernel against a float64 reference, on a GPU; with TRITON_INTERPRET=1 the Triton kernels run here on
the CPU, at smaller sizes.

Outputs are poisoned with NaN before a run, and so is every cache slot and block that no row owns: reading one
shows.
"""

from __future__ import annotations

import importlib
import importlib.util
import os

import pytest

torch = pytest.importorskip("torch")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from plugins.kernels.ops import BatchMetadata  # noqa: E402
from plugins.kernels.torch import ops as reference  # noqa: E402
from plugins.kernels.triton import ops as kernels  # noqa: E402
from plugins.kernels.triton.linear import TileShape, tile_shape  # noqa: E402
from plugins.parallel.peers import Peers  # noqa: E402

# ||out - ref|| / ||ref|| allowed, by dtype. The interpreter has no bfloat16 arithmetic of its own.
ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(out, expected, dtype=None):
    out, expected = out.double(), expected.double()
    bound = ERROR[dtype or torch.float32]
    distance = ((out - expected).norm() / expected.norm()).item()
    assert distance < bound, f"relative error {distance:.2e}, allowed {bound:.0e}"  # NaN fails too


def random(*shape, dtype):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def poisoned(monkeypatch):
    """torch.empty hands out NaN, so an element that no kernel wrote shows."""
    plain = torch.empty

    def empty(*args, **kwargs):
        out = plain(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(-(2**30))

    monkeypatch.setattr(torch, "empty", empty)


def paged_batch(queries, contexts, block_size, kv_heads, group, size, dtype, unused=float("nan")):
    """q, caches, BatchMetadata with every row's blocks scattered; what belongs to no row is `unused`, spare
    table entries point at it."""
    rows = len(contexts)
    needed = [-(-context // block_size) for context in contexts]
    width = max(needed) + 2
    blocks = sum(needed) + 3
    order = (torch.randperm(blocks - 1) + 1).tolist()  # block 0 is the reserved one
    tables = torch.zeros(rows, width, dtype=torch.int32)
    k_cache = torch.full((blocks, block_size, kv_heads, size), unused, dtype=dtype, device=DEVICE)
    v_cache = k_cache.clone()
    keys, values = [], []
    for i, context in enumerate(contexts):
        mine = [order.pop() for _ in range(needed[i])]
        tables[i, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        k, v = random(context, kv_heads, size, dtype=dtype), random(context, kv_heads, size, dtype=dtype)
        slots = torch.tensor(
            [mine[p // block_size] * block_size + p % block_size for p in range(context)],
            dtype=torch.int64,
            device=DEVICE,
        )
        k_cache.view(-1, kv_heads, size)[slots], v_cache.view(-1, kv_heads, size)[slots] = k, v
        keys.append(k), values.append(v)
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    batch = BatchMetadata(
        slot_mapping=torch.zeros(sum(queries), dtype=torch.int64, device=DEVICE),
        block_tables=tables.to(DEVICE),
        cu_seqlens_q=starts.to(DEVICE),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=DEVICE),
        max_seqlen_q=max(queries),
        max_seqlen_k=max(contexts),
        block_size=block_size,
    )
    return random(sum(queries), kv_heads * group, size, dtype=dtype), k_cache, v_cache, batch, keys, values


def attend(q, queries, contexts, keys, values, scale):
    """Float64, row by row, straight from the definition."""
    out, start = [], 0
    for count, context, k, v in zip(queries, contexts, keys, values, strict=True):
        rows = q[start : start + count].double()
        group = rows.shape[1] // k.shape[1]
        k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", rows, k) * scale
        position = torch.arange(context - count, context, device=q.device)
        scores = scores.masked_fill(torch.arange(context, device=q.device) > position[:, None], float("-inf"))
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
        start += count
    return torch.cat(out)


def cut(rows, lengths):
    return [row[:n] for row, n in zip(rows, lengths, strict=True)]


def check_attention(
    monkeypatch, attention, queries, contexts, block_size, kv_heads, group, size, dtype, unused=float("nan")
):
    q, k_cache, v_cache, batch, keys, values = paged_batch(
        queries, contexts, block_size, kv_heads, group, size, dtype, unused
    )
    poisoned(monkeypatch)
    for _layer in range(2):  # the second layer finds the plan of the first
        out = attention(q, k_cache, v_cache, batch, size**-0.5)
        close(out, attend(q, queries, contexts, keys, values, size**-0.5), dtype)


# (queries, contexts): odd lengths, one token, block and tile edges, chunks that continue a prefix
DECODES = ([1, 1, 1, 1, 1, 1], [1, 15, 16, 17, 64, 203])
MIXED = ([1, 5, 1, 33, 2, 64, 1], [1, 5, 130, 97, 66, 64, 64])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [DECODES, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("size", [64, 80, 128, 256])
def test_attention_of_every_head_size(monkeypatch, size, rows, dtype):
    check_attention(monkeypatch, kernels.attention, *rows, 16, 2, 2, size, dtype)


@pytest.mark.parametrize("rows", [DECODES, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8])
def test_attention_of_every_gqa_ratio(monkeypatch, group, rows):
    check_attention(monkeypatch, kernels.attention, *rows, 16, 2, group, 64, DTYPES[-1])


@pytest.mark.parametrize("rows", [DECODES, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("block_size", [1, 8, 16, 24, 32, 64, 128, 256])
def test_attention_of_every_block_size(monkeypatch, block_size, rows):
    check_attention(monkeypatch, kernels.attention, *rows, block_size, 1, 2, 64, DTYPES[-1])


@pytest.mark.parametrize("group", [2, 8])
@pytest.mark.parametrize("size", [64] if INTERPRETED else [64, 80, 128, 256])
def test_many_rows(monkeypatch, size, group):
    """Enough work for the launch shapes of large batches; shares cut rows anywhere."""
    contexts = torch.randint(1, 40 if INTERPRETED else 700, (140,)).tolist()
    check_attention(monkeypatch, kernels.attention, [1] * 140, contexts, 16, 2, group, size, DTYPES[-1])


def test_one_row_alone(monkeypatch):
    for context in (1, 64, 65, 500):
        check_attention(monkeypatch, kernels.attention, [1], [context], 16, 2, 4, 64, DTYPES[-1])


def test_a_padding_row_without_context_gives_zeros():
    q, k_cache, v_cache, batch, *_ = paged_batch([1, 1], [40, 1], 16, 1, 2, 64, torch.float16)
    batch.context_lens[1] = 0
    assert (kernels.attention(q, k_cache, v_cache, batch, 0.125)[1] == 0).all()


def test_parts_of_a_row_are_combined_the_same_way_every_time():
    q, k_cache, v_cache, batch, *_ = paged_batch([1] * 3, [700, 3, 90], 16, 2, 4, 64, torch.float16)
    runs = []
    for _ in range(2 if INTERPRETED else 20):
        batch.extra.clear()
        runs.append(kernels.attention(q, k_cache, v_cache, batch, 0.125))
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [5, 64, 80, 1000, 1024])
def test_rms_norm(monkeypatch, n, dtype):
    x, weight = random(7, n, dtype=dtype), random(n, dtype=dtype)
    expected = weight.double() * x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    total = x + (residual := random(7, n, dtype=dtype))
    both = weight.double() * total.double() * (total.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    poisoned(monkeypatch)
    close(kernels.rms_norm(x, weight, 1e-6), expected, dtype)
    norm, added = kernels.add_rms_norm(x.clone(), residual, weight, 1e-6)
    close(norm, both, dtype)
    assert torch.equal(added, total)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_and_mul(monkeypatch, dtype):
    x = random(5, 2 * 1100, dtype=dtype)
    gate, up = x.double().chunk(2, -1)
    poisoned(monkeypatch)
    close(kernels.silu_and_mul(x), gate * gate.sigmoid() * up, dtype)


def angles(size):
    at = torch.arange(64).double()[:, None] * 10000.0 ** (-torch.arange(0, size, 2).double() / size)
    return torch.cat((at.cos(), at.sin()), dim=-1).to(DEVICE)  # float64 [64, size]


def rotated(x, positions, cos_sin):
    cos, sin = cos_sin[positions][:, None].chunk(2, -1)
    first, second = x.double().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 80, 128, 256])
@pytest.mark.parametrize("with_norm", [True, False], ids=["qk_norm", "plain"])
def test_projection_to_attention_in_one_kernel(monkeypatch, with_norm, size, dtype):
    heads, kv_heads, tokens = 7, 3, 9
    qkv = random(tokens, (heads + 2 * kv_heads) * size, dtype=dtype)
    q_weight, k_weight = (random(size, dtype=dtype), random(size, dtype=dtype)) if with_norm else (None, None)
    cos_sin, positions = angles(size), torch.randint(64, (tokens,), device=DEVICE)
    slots = torch.randperm(48, device=DEVICE)[:tokens]
    k_cache = torch.full((3, 16, kv_heads, size), float("nan"), dtype=dtype, device=DEVICE)
    v_cache = k_cache.clone()
    q, k, v = qkv.view(tokens, -1, size).split((heads, kv_heads, kv_heads), dim=1)
    if with_norm:
        q, k = (
            w.double() * x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            for x, w in ((q, q_weight), (k, k_weight))
        )
    poisoned(monkeypatch)
    out = kernels.qk_norm_rope_store(
        qkv, q_weight, k_weight, 1e-6, positions, cos_sin.float(), k_cache, v_cache, slots, heads, kv_heads
    )
    close(out, rotated(q, positions, cos_sin), dtype)
    close(k_cache.view(48, kv_heads, size)[slots], rotated(k, positions, cos_sin), dtype)
    assert torch.equal(v_cache.view(48, kv_heads, size)[slots], v)
    untouched = torch.ones(48, dtype=torch.bool, device=DEVICE).index_fill(0, slots, False)
    assert k_cache.view(48, -1)[untouched].isnan().all() and v_cache.view(48, -1)[untouched].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 80])
def test_rotary_and_store_take_slices_of_a_projection(monkeypatch, size, dtype):
    q, k, v = random(6, 5 + 2 + 2, size, dtype=dtype).split((5, 2, 2), dim=1)
    cos_sin, positions = angles(size), torch.randint(64, (6,), device=DEVICE)
    k_cache = torch.full((2, 16, 2, size), float("nan"), dtype=dtype, device=DEVICE)
    v_cache = k_cache.clone()
    slots = torch.randperm(32, device=DEVICE)[:6]
    poisoned(monkeypatch)
    for out, x in zip(kernels.rotary(q, k, positions, cos_sin.float()), (q, k), strict=True):
        close(out, rotated(x, positions, cos_sin), dtype)
    kernels.store_kv(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache.view(32, 2, size)[slots], k) and torch.equal(
        v_cache.view(32, 2, size)[slots], v
    )
    assert (~k_cache.isnan()).sum() == k.numel() and (~v_cache.isnan()).sum() == v.numel()


@pytest.mark.skipif(INTERPRETED, reason="needs more than 4 GiB of GPU memory")
def test_caches_past_2_to_the_31_elements():
    block_size, kv_heads, size = 16, 8, 128
    blocks = 2**31 // (block_size * kv_heads * size) + 64
    k_cache = torch.full(
        (blocks, block_size, kv_heads, size), float("nan"), dtype=torch.bfloat16, device=DEVICE
    )
    v_cache = k_cache.clone()
    tables = torch.arange(blocks - 7, blocks, dtype=torch.int32, device=DEVICE)[None]
    slots = torch.arange((blocks - 7) * block_size, (blocks - 7) * block_size + 100, device=DEVICE)
    k, v, q = (random(100, heads, size, dtype=torch.bfloat16) for heads in (kv_heads, kv_heads, 16))
    kernels.store_kv(k, v, k_cache, v_cache, slots)
    for queries in (1, 60):
        batch = BatchMetadata(
            slots,
            tables,
            torch.tensor([0, queries], dtype=torch.int32, device=DEVICE),
            torch.tensor([100], dtype=torch.int32, device=DEVICE),
            queries,
            100,
            block_size,
        )
        close(
            kernels.attention(q[:queries], k_cache, v_cache, batch, 0.1),
            attend(q[:queries], [queries], [100], [k], [v], 0.1),
            torch.bfloat16,
        )


# ---- sums over ranks -------------------------------------------------------------------------------------


def where(tensors):
    return torch.tensor([tensor.data_ptr() for tensor in tensors], device=DEVICE)


def on_the_host(value):
    word = torch.tensor([value], dtype=torch.int32)
    return word if INTERPRETED else word.pin_memory()


class Alone:
    """One rank of several, with all ranks' memory on one device, and every peer at the meeting already."""

    def __init__(self, place, ranks, rows):
        self.place, self.flags = (
            place,
            [torch.zeros(rows, ranks, dtype=torch.int32, device=DEVICE) for _ in range(ranks)],
        )
        self.peers = Peers(place, where(self.flags), on_the_host(0))

    def met(self, call, programs):
        """What `call` answers; it takes each peer's flag of so many programs, and sets its own with every
        peer."""
        for flag in self.flags:
            flag.zero_()
        self.flags[self.place][:programs] = 1
        self.flags[self.place][:, self.place] = 0
        result = call(self.peers)
        for rank, flag in enumerate(self.flags):
            assert flag[:, self.place].sum() == programs * (rank != self.place)
            assert flag.sum() == flag[:, self.place].sum()
        return result


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("n", [48, 1024])
def test_the_norm_of_a_sum_over_ranks_reads_every_part_and_meets_every_peer(ranks, n):
    dtype, rows = DTYPES[-1], 5
    parts = [random(rows, n, dtype=dtype) for _ in range(ranks)]
    residual, weight = random(rows, n, dtype=dtype), random(n, dtype=dtype)
    expected = reference.add_rms_norm(
        sum(part.float() for part in parts).to(dtype), residual.clone(), weight, 1e-6
    )
    everyone = [Alone(place, ranks, rows) for place in range(ranks)]
    sums = [torch.full((rows, n), float("nan"), dtype=dtype, device=DEVICE) for _ in range(ranks)]
    for rank in everyone:  # each fills its rows of the sum
        rank.met(lambda peers, place=rank.place: peers.sum_rows(where(parts), sums[place]), -(-rows // ranks))
        assert sums[rank.place].isnan().any(1).tolist() == [row % ranks != rank.place for row in range(rows)]
    for rank in everyone:
        for lies, summed in ((parts, False), (sums, True)):
            args = where(lies), residual.clone(), weight, 1e-6
            norm, added = rank.met(
                lambda peers, args=args, summed=summed: peers.sum_add_rms_norm(*args, summed=summed), rows
            )
            assert torch.equal(added, expected[1])
            close(norm, expected[0], dtype)
        rank.met(Peers.barrier, 1)


def test_nobody_waits_for_a_peer_once_the_run_has_failed():
    flags = [torch.zeros(3, 2, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    peers = Peers(0, where(flags), on_the_host(1))
    peers.barrier()
    peers.barrier()  # its own flag is still with the peer, which never took it
    assert flags[1].sum() == 1


# ---- sampling --------------------------------------------------------------------------------------------


def sampling(rows, vocab, dtype=torch.float32):
    logits = (torch.randn(rows, vocab, device=DEVICE) * 3).to(dtype)
    temperature = torch.linspace(0.5, 1.5, rows, device=DEVICE)
    seeds = torch.randint(-(2**62), 2**62, (rows,), device=DEVICE)
    return logits, temperature, seeds, torch.randint(2**20, (rows,), device=DEVICE)


def filters(rows, top_k=0, top_p=1.0, min_p=0.0):
    return (
        torch.full((rows,), top_k, dtype=torch.int32, device=DEVICE),
        torch.full((rows,), top_p, device=DEVICE),
        torch.full((rows,), min_p, device=DEVICE),
    )


@pytest.mark.parametrize("vocab", [1, 37, 5000])
def test_greedy_sampling_is_argmax_and_ties_go_to_the_first(vocab):
    logits, temperature, seeds, positions = sampling(6, vocab)
    logits[0] = 1.0
    expected = logits.argmax(-1)
    expected[0] = 0
    assert torch.equal(kernels.sample(logits, None, None, None, None, seeds, positions), expected)
    assert torch.equal(
        kernels.sample(logits, torch.zeros_like(temperature), *filters(6), seeds, positions), expected
    )


@pytest.mark.parametrize("vocab", [37, 9000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sampled_tokens_are_the_reference_backends(vocab, dtype):
    logits, temperature, seeds, positions = sampling(32, vocab, dtype)
    temperature[::5] = 0
    out = kernels.sample(logits, temperature, None, None, None, seeds, positions)
    expected = reference.sample(logits, temperature, None, None, None, seeds, positions)
    assert out.dtype == torch.int64
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", [kernels, reference], ids=["triton", "torch"])
@pytest.mark.parametrize("parts", [(1, 36), (2048, 2048, 904), (2500, 2500)], ids=str)
def test_the_best_of_the_parts_of_a_vocabulary_is_the_best_of_all(backend, parts):
    logits, temperature, seeds, positions = sampling(32, sum(parts))
    temperature[::5] = 0
    logits[5] = 1.0  # greedy, and all alike: the first part's first token
    for warmth in (temperature, None):
        found, first = [], 0
        for part in logits.split(parts, dim=1):
            found.append(backend.sample_part(part, warmth, seeds, positions, first))
            first += part.shape[1]
        tokens, scores = (torch.stack(each) for each in zip(*found, strict=True))
        best = tokens.gather(0, scores.argmax(0, keepdim=True)).squeeze(0)
        assert torch.equal(best, backend.sample(logits, warmth, None, None, None, seeds, positions))


@pytest.mark.parametrize(
    "limits",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"min_p": 0.2},
        {"top_k": 20, "top_p": 0.7, "min_p": 0.05},
        {"top_k": 10**6},
    ],
    ids=str,
)
def test_filtered_tokens_are_the_reference_backends(limits):
    logits, temperature, seeds, positions = sampling(24, 3000)
    logits[3] = logits[3].round()  # ties at the edge of every filter
    temperature[::5] = 0
    given = filters(24, **limits)
    out = kernels.sample(logits, temperature, *given, seeds, positions)
    assert torch.equal(out, reference.sample(logits, temperature, *given, seeds, positions))


def test_rows_with_and_without_filters_share_a_batch():
    logits, temperature, seeds, positions = sampling(12, 3000)
    top_k, top_p, min_p = filters(12)
    top_k[::2], top_p[::3], min_p[1] = 5, 0.5, 0.1
    out = kernels.sample(logits, temperature, top_k, top_p, min_p, seeds, positions)
    assert torch.equal(out, reference.sample(logits, temperature, top_k, top_p, min_p, seeds, positions))
    alone = [
        kernels.sample(*(x[i : i + 1] for x in (logits, temperature, top_k, top_p, min_p, seeds, positions)))
        for i in range(12)
    ]
    assert torch.equal(out, torch.cat(alone))  # a different batch changes no token


# ---- what only a GPU has ---------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_a_captured_graph_follows_the_lengths():
    q, k_cache, v_cache, batch, keys, values = paged_batch([1] * 6, [300] * 6, 16, 2, 4, 128, torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # the warm-up leaves a plan behind that the capture must not reuse
        kernels.attention(q, k_cache, v_cache, batch, 0.1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.attention(q, k_cache, v_cache, batch, 0.1)
    for contexts in ([300] * 6, [1, 7, 64, 300, 129, 16], [16] * 6):
        batch.context_lens.copy_(torch.tensor(contexts, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        close(
            out, attend(q, [1] * 6, contexts, cut(keys, contexts), cut(values, contexts), 0.1), torch.bfloat16
        )


flash = pytest.mark.skipif(
    INTERPRETED
    or not (importlib.util.find_spec("flash_attn_interface") or importlib.util.find_spec("flash_attn")),
    reason="needs FlashAttention",
)


@flash
@pytest.mark.parametrize("rows", [DECODES, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("size", [64, 80, 128, 256])
@pytest.mark.parametrize("package", ["flash_attn_interface", "flash_attn"])
def test_flash_attention(monkeypatch, package, size, rows):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    name = {"flash_attn_interface": "fa3", "flash_attn": "fa2"}[package]
    attention = importlib.import_module(f"plugins.kernels.flash_attn.{name}").attention
    # FlashAttention-3 multiplies the values behind a row's end by probabilities of 0, so a NaN there comes
    # through: large, not NaN.
    check_attention(monkeypatch, attention, *rows, 256, 2, 4, size, torch.bfloat16, unused=1e4)


@flash
def test_a_captured_graph_of_flash_attention_follows_the_lengths():
    from plugins.kernels.flash_attn import FlashAttnKernels

    attention = FlashAttnKernels().operations("cuda").attention
    q, k_cache, v_cache, batch, keys, values = paged_batch(
        [1] * 6, [900] * 6, 256, 2, 4, 128, torch.bfloat16, unused=1e4
    )
    attention(q, k_cache, v_cache, batch, 0.1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k_cache, v_cache, batch, 0.1)
    for contexts in ([900] * 6, [1, 7, 64, 300, 129, 16]):
        batch.context_lens.copy_(torch.tensor(contexts, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        close(
            out, attend(q, [1] * 6, contexts, cut(keys, contexts), cut(values, contexts), 0.1), torch.bfloat16
        )


# Whole rows, tiles of rows, and a shape that neither takes.
LINEARS = (
    [(64, 1024), (256, 256), (96, 1000)]
    if INTERPRETED
    else [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (96, 1000)]
)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 33, 64, 65, 100, 129])
@pytest.mark.parametrize(("n", "k"), LINEARS)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(monkeypatch, rows, n, k, bias):
    dtype = DTYPES[-1]
    x, weight, b = (
        random(rows, k, dtype=dtype),
        random(n, k, dtype=dtype) * 0.05,
        random(n, dtype=dtype) if bias else None,
    )
    poisoned(monkeypatch)
    out = kernels.linear(x, weight, b)
    close(out, x.double() @ weight.double().T + (0 if b is None else b.double()), dtype)


TILED = (
    [(5, 128), (64, 256), (130, 1024)]
    if INTERPRETED
    else [(5, 1024), (64, 1024), (65, 2048), (128, 3072), (200, 2048), (256, 1024)]
)


@pytest.mark.parametrize("tile", [32, 64])
@pytest.mark.parametrize(("rows", "k"), TILED)
def test_a_product_with_its_activation(monkeypatch, rows, k, tile):
    dtype, n = DTYPES[-1], 192
    x, weight = random(rows, k, dtype=dtype), random(2 * n, k, dtype=dtype) * k**-0.5
    gate, up = (x.double() @ weight.double().T).chunk(2, -1)
    poisoned(monkeypatch)
    close(kernels.gated_linear(x, weight, None, TileShape(tile)), gate * gate.sigmoid() * up, dtype)
    close(kernels.gated_linear(x, weight, None), gate * gate.sigmoid() * up, dtype)
    bias = random(2 * n, dtype=dtype)
    gate, up = (x.double() @ weight.double().T + bias.double()).chunk(2, -1)
    close(kernels.gated_linear(x, weight, bias), gate * gate.sigmoid() * up, dtype)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize(("rows", "k"), TILED[1:])
def test_a_product_in_parts_and_the_norm_that_adds_them(monkeypatch, rows, k, parts):
    dtype, n = DTYPES[-1], 1024 if parts == 4 else 192
    if k % (parts * 128):
        pytest.skip("columns do not divide")
    x, weight, residual, norm = (
        random(rows, k, dtype=dtype),
        random(n, k, dtype=dtype) * k**-0.5,
        random(rows, n, dtype=dtype),
        random(n, dtype=dtype),
    )
    product = x.double() @ weight.double().T
    total = product + residual.double()
    poisoned(monkeypatch)
    for shape in (TileShape(64, parts), None):
        out = kernels.linear_parts(x, weight, None, shape)
        close(out if out.dim() == 2 else out.sum(0), product, dtype)
        normed, added = kernels.add_rms_norm(out, residual.clone(), norm, 1e-6)
        close(added, total, dtype)
        close(normed, norm.double() * total * (total.square().mean(-1, keepdim=True) + 1e-6).rsqrt(), dtype)
        assert normed.dtype == added.dtype == dtype


@pytest.mark.parametrize(
    ("rows", "n", "k", "parts"),
    [(16, 4096, 1024, 1), (128, 1024, 2048, 8), (256, 1024, 3072, 8), (256, 4096, 1024, 1), (7, 96, 384, 8)],
)
def test_a_tile_shape_runs_at_once_and_covers_the_product(rows, n, k, parts):
    shape = tile_shape(rows, n, k, 132, parts)
    programs = -(-rows // 64) * (n // shape.tile) * shape.parts
    assert programs <= 132 and not n % shape.tile and not k % (128 * shape.parts) and shape.parts <= parts


@pytest.mark.parametrize(("rows", "n", "k"), [(256, 24576, 4096), (65, 96, 1000), (9, 100, 1024)])
def test_other_products_are_left_to_cublas(rows, n, k):
    assert tile_shape(rows, n, k, 132) is None


@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_decode_bookkeeping_is_the_reference(block_size):
    rows = torch.tensor([5, 0, 3, 9, 9], device=DEVICE)  # row 9 is padding
    lengths, last = (
        torch.tensor([7, 3, 0, 40, 1, 300, 2, 2, 2, 0], device=DEVICE),
        torch.arange(10, device=DEVICE) * 7,
    )
    tables = torch.randint(1, 99, (10, 301), dtype=torch.int32, device=DEVICE)
    mine, theirs = (
        ops.decode_inputs(rows, lengths, last, tables, block_size) for ops in (kernels, reference)
    )
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    after = []
    for ops in (kernels, reference):
        state = lengths.clone(), last.clone()
        ops.advance(rows, torch.tensor([91, 92, 93, 94, 95], device=DEVICE), *state)
        after.append(state)
    assert torch.equal(after[0][0], after[1][0]) and torch.equal(after[0][1][:9], after[1][1][:9])


@pytest.mark.parametrize(("updates", "admitted"), [(0, 0), (3, 0), (0, 2), (700, 300)])
def test_what_a_step_says_about_rows_is_written_as_the_reference_does(updates, admitted):
    rows, width = 400, 50
    draw = lambda n, below: torch.randperm(below)[:n]  # noqa: E731
    words = torch.randint(-(2**31), 2**31, (admitted, 6))
    admissions = torch.cat((draw(admitted, rows).unsqueeze(1), words), dim=1)
    said = torch.cat(
        (
            draw(updates, rows * width),
            torch.randint(0, 99, (updates,)),
            admissions.flatten(),
            torch.ones(9).long(),
        )
    )
    after = []
    for ops in (kernels, reference):
        tables = torch.full((rows, width), 7, dtype=torch.int32, device=DEVICE)
        numbers, top_k = (
            torch.zeros((3, rows), device=DEVICE),
            torch.zeros(rows, dtype=torch.int32, device=DEVICE),
        )
        seeds = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
        ops.update_rows(
            said.to(DEVICE), updates, admitted, block_tables=tables, numbers=numbers, top_k=top_k, seeds=seeds
        )
        after.append((tables, numbers.view(torch.int32), top_k, seeds))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*after, strict=True))
