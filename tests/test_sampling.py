"""Sampling: the right distribution, and chance that depends on (seed, request, position) alone."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from helpers.torch_engines import engine_of, generate, prepared, reference, shared_prompts, variant

from headway import Arrival, SamplingParams
from plugins.executors.torch.batch import request_seed
from plugins.kernels.ops import gumbel
from plugins.kernels.torch import ops

DRAWS = 20_000
PROMPTS = shared_prompts(512, seed=3)


def draw(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, count=DRAWS):
    """`count` tokens from one distribution: one a position of one request."""
    rows = logits.expand(count, -1)
    full = lambda value, kind: torch.full((count,), value, dtype=kind)  # noqa: E731
    filters = (full(top_k, torch.int32), full(top_p, torch.float32), full(min_p, torch.float32))
    if top_k == 0 and top_p == 1 and min_p == 0:
        filters = (None, None, None)
    return ops.sample(
        rows, full(temperature, torch.float32), *filters, full(11, torch.int64), torch.arange(count)
    )


def assert_follows(tokens, probabilities):
    """Chi-square at about five standard deviations, over tokens that are expected at least ten times; nothing
    outside the support."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    assert counts[probabilities == 0].sum() == 0
    want = probabilities.double() * len(tokens)
    common = want >= 10
    chi = ((counts - want)[common] ** 2 / want[common]).sum().item()
    freedom = int(common.sum()) - 1
    assert chi < freedom + 5 * math.sqrt(2 * freedom) + 5


LOGITS = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature(temperature):
    assert_follows(draw(LOGITS, temperature=temperature), (LOGITS / temperature).softmax(-1))


@pytest.mark.parametrize("top_k", [1, 5, 39, 1000])
def test_top_k_keeps_the_k_likeliest(top_k):
    kept = LOGITS.topk(min(top_k, 40)).indices
    probabilities = torch.zeros(40).index_copy(0, kept, LOGITS[kept].softmax(-1))
    assert_follows(draw(LOGITS, top_k=top_k), probabilities)


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9])
def test_top_p_keeps_the_smallest_set_that_holds_the_mass(top_p):
    probabilities = LOGITS.softmax(-1)
    order = probabilities.argsort(descending=True)
    count = int((probabilities[order].cumsum(0) < top_p).sum()) + 1
    expected = torch.zeros(40).index_copy(0, order[:count], LOGITS[order[:count]].softmax(-1))
    assert_follows(draw(LOGITS, top_p=top_p), expected)


def test_min_p_keeps_what_is_likely_beside_the_likeliest():
    probabilities = LOGITS.softmax(-1)
    kept = probabilities >= 0.2 * probabilities.max()
    assert 1 < kept.sum() < 40
    assert_follows(draw(LOGITS, min_p=0.2), torch.where(kept, probabilities, 0) / probabilities[kept].sum())


def test_filters_act_one_after_the_other():
    top = LOGITS.topk(8).indices
    inside = (LOGITS[top] / 0.8).softmax(-1)  # sorted, so top_p cuts a tail
    count = int((inside.cumsum(0) < 0.8).sum()) + 1
    kept = inside[:count] >= 0.25 * inside[0]
    final = torch.where(kept, inside[:count], 0)
    assert_follows(
        draw(LOGITS, temperature=0.8, top_k=8, top_p=0.8, min_p=0.25),
        torch.zeros(40).index_copy(0, top[:count], final / final.sum()),
    )


def test_temperature_zero_is_argmax_also_beside_random_rows():
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(1))
    temperature = torch.tensor([0.0, 1.0, 0.0, 0.5, 0.0, 2.0])
    seeds, positions = torch.arange(6), torch.arange(6)
    tokens = ops.sample(logits, temperature, None, None, None, seeds, positions)
    assert torch.equal(tokens[::2], logits.argmax(-1)[::2])
    assert torch.equal(ops.sample(logits, None, None, None, None, seeds, positions), logits.argmax(-1))


def test_noise_is_the_documented_function():
    seeds, positions = torch.tensor([0, 123456789012345, -5, 2**63 - 1]), torch.tensor([0, 7, 99, 40959])
    noise = ops._gumbel(seeds, positions, 300)
    for row, token in product(range(4), range(300)):
        assert noise[row, token].item() == pytest.approx(
            gumbel(int(seeds[row]), int(positions[row]), token), abs=1e-5
        )


def assert_no_pattern(noise):
    """Moments, and no correlation along tokens or along rows at any of these distances."""
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.015)
    assert noise.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.015)
    for other in (
        noise.roll(1, 0),
        *(noise.roll(distance, 1) for distance in (1, 2, 3, 4, 7, 8, 16, 32, 64, 128, 256)),
    ):
        assert abs(torch.corrcoef(torch.stack((noise.flatten(), other.flatten())))[0, 1].item()) < 0.012
    # pairs of neighbours in 8 x 8 equally likely cells: a row's own pattern shows even where rows cancel each
    # other's
    cell = (torch.exp(-torch.exp(-noise.double())) * 8).long().clamp_(max=7)
    pair = cell[:, :-1] * 8 + cell[:, 1:] + torch.arange(len(cell)).unsqueeze(1) * 64
    counts = torch.bincount(pair.flatten(), minlength=64 * len(cell)).double()
    want = (noise.shape[1] - 1) / 64
    chi, freedom = ((counts - want) ** 2 / want).sum().item(), 63 * len(cell)
    assert abs(chi - freedom) < 6 * math.sqrt(2 * freedom)


def noises(tokens=500):
    by_position = ops._gumbel(torch.zeros(400, dtype=torch.int64), torch.arange(400), tokens)
    by_seed = ops._gumbel(torch.arange(400), torch.zeros(400, dtype=torch.int64), tokens)
    return by_position, by_seed


def test_noise_has_no_pattern():
    by_position, by_seed = noises()
    assert_no_pattern(by_position)
    assert_no_pattern(by_seed)
    assert abs(torch.corrcoef(torch.stack((by_position.flatten(), by_seed.flatten())))[0, 1].item()) < 0.012


@pytest.mark.parametrize(
    "fold",
    [lambda x, by: x * by & 0xFFFFFFFF, lambda x, by: x * by >> 32 & 0xFFFFFFFF],
    ids=["low half", "high half"],
)
def test_half_a_product_is_a_pattern(monkeypatch, fold):
    monkeypatch.setattr(ops, "_fold32", fold)
    with pytest.raises(AssertionError):
        assert_no_pattern(noises()[0])


@pytest.mark.parametrize(
    "wrong",
    [lambda noise: noise * 1.05, lambda noise: noise.clamp(max=4.0), torch.randn_like],
    ids=["scale", "tail", "normal"],
)
def test_another_noise_is_another_distribution(monkeypatch, wrong):
    right = ops._gumbel
    monkeypatch.setattr(ops, "_gumbel", lambda *given: wrong(right(*given)))
    with pytest.raises(AssertionError):
        assert_follows(draw(LOGITS), LOGITS.softmax(-1))


@pytest.mark.parametrize("bits", [0, 2**32 - 1])
def test_every_finite_logit_can_win_and_no_other(monkeypatch, bits):
    monkeypatch.setattr(ops, "_fold32", lambda x, by: torch.full_like(x, bits))
    logits = torch.full((1, 50), float("-inf"))
    logits[0, 31] = -1e30
    assert ops._gumbel(torch.zeros(1).long(), torch.zeros(1).long(), 50).isfinite().all()
    assert (
        ops.sample(
            logits, torch.ones(1), None, None, None, torch.zeros(1).long(), torch.zeros(1).long()
        ).item()
        == 31
    )


def test_rows_do_not_depend_on_their_neighbours():
    logits = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    temperature, top_k = torch.linspace(0.5, 2, 8), torch.arange(8, dtype=torch.int32)
    top_p, min_p, seeds, positions = (
        torch.linspace(0.3, 1, 8),
        torch.linspace(0, 0.2, 8),
        torch.arange(8) * 77,
        torch.arange(8) * 3,
    )
    together = ops.sample(logits, temperature, top_k, top_p, min_p, seeds, positions)
    order = torch.tensor([5, 2, 7])
    alone = ops.sample(*(t[order] for t in (logits, temperature, top_k, top_p, min_p, seeds, positions)))
    assert torch.equal(together[order], alone)


SAMPLINGS = [
    SamplingParams(temperature=0.9, max_tokens=10, ignore_eos=True),
    SamplingParams(temperature=1.3, top_p=0.9, top_k=50, min_p=0.01, max_tokens=10, ignore_eos=True),
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_policy_batch_and_overlap_do_not_change_a_sampled_token(sampling):
    executor = prepared(variant("qwen3"))
    alone = [generate_one(executor, f"p{i}", prompt, sampling) for i, prompt in enumerate(PROMPTS)]
    for scheduler, cache, chunk, max_inflight in (
        ("chunked", "hash", 7, 2),
        ("fcfs", "none", 64, 1),
        ("pd_split", "radix", 7, 2),
    ):
        engine = engine_of(executor, scheduler, cache, chunk=chunk, num_blocks=20, max_inflight=max_inflight)
        assert generate(engine, PROMPTS, sampling) == alone
        assert engine.roster.num_preemptions > 0


def generate_one(executor, id, prompt, sampling, seed=0):
    result = engine_of(executor, seed=seed).run([Arrival(0.0, prompt, sampling, id=id)])
    return result.outputs[0].output_token_ids


def test_the_seed_and_the_request_change_what_is_sampled():
    executor, sampling = prepared(variant("qwen3")), SAMPLINGS[0]
    first = generate_one(executor, "a", PROMPTS[0], sampling)
    assert generate_one(executor, "a", PROMPTS[0], sampling) == first
    assert generate_one(executor, "b", PROMPTS[0], sampling) != first
    assert generate_one(executor, "a", PROMPTS[0], sampling, seed=1) != first


def test_a_request_with_its_own_seed_repeats_itself_anywhere():
    executor, sampling = (
        prepared(variant("qwen3")),
        SamplingParams(temperature=1.0, seed=5, max_tokens=8, ignore_eos=True),
    )
    assert generate_one(executor, "a", PROMPTS[0], sampling) == generate_one(
        executor, "b", PROMPTS[0], sampling, seed=9
    )


def test_seeds_are_the_same_in_every_process():
    from headway import Request

    request = Request(
        Arrival(0.0, [1], SamplingParams(), id="r7"), 0, max_model_len=8, eos_token_ids=frozenset()
    )
    assert request_seed(request, 3) == -3184837468248220251


def test_greedy_and_random_requests_in_one_batch():
    executor = prepared(variant("qwen3"))
    mixed = [SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), SAMPLINGS[0], SAMPLINGS[1]] * 2
    together = engine_of(executor).run(
        [Arrival(0.0, p, s, id=f"p{i}") for i, (p, s) in enumerate(zip(PROMPTS, mixed, strict=False))]
    )
    for i, output in enumerate(together.outputs):
        assert output.output_token_ids == generate_one(executor, f"p{i}", PROMPTS[i], mixed[i])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_those_of_transformers_before_temperature(temperature):
    directory = variant("qwen3")
    asked = [
        SamplingParams(temperature=temperature, logprobs=n, max_tokens=5, ignore_eos=True)
        for n in (3, 0, None, 7)
    ]
    arrivals = [Arrival(0.0, prompt, sampling) for prompt, sampling in zip(PROMPTS, asked, strict=False)]
    result = engine_of(prepared(directory), chunk=7, max_inflight=2).run(arrivals)
    for arrival, output in zip(arrivals, result.outputs, strict=True):
        wanted, prompt = arrival.sampling.logprobs, arrival.prompt_token_ids
        if wanted is None:
            assert not any(output.logprobs)
            continue
        with torch.no_grad():
            logits = reference(directory)(torch.tensor([prompt + output.output_token_ids])).logits[0]
        for i, at in enumerate(output.logprobs):
            expected = logits[len(prompt) - 1 + i].log_softmax(-1)
            assert at.token == output.output_token_ids[i]
            assert at.logprob == pytest.approx(expected[at.token].item(), abs=1e-4)
            assert at.rank == int((expected > expected[at.token]).sum()) + 1
            assert list(at.best) == expected.topk(wanted).indices.tolist()
            assert list(at.best.values()) == pytest.approx(expected.topk(wanted).values.tolist(), abs=1e-4)
