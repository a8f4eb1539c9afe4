"""What the tests of the real engine share: checkpoints, engines, and transformers as the reference."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM

from headway import Arrival, Engine, EngineConfig, ModelConfig, SamplingParams
from plugins.cache.hash import HashBlocks
from plugins.cache.none import NoCache
from plugins.cache.radix import RadixTree
from plugins.executors.torch import TorchExecutor
from plugins.models.checkpoints import find_checkpoint
from plugins.models.tiny import LLAMA, QWEN3, write_checkpoint
from plugins.schedulers.chunked import ChunkedPrefill
from plugins.schedulers.pd_split import TwoPhase
from plugins.schedulers.prefill_first import PrefillFirst

from .roles import default_roles

CACHES = {"none": NoCache, "hash": HashBlocks, "radix": RadixTree}
SCHEDULERS = ("fcfs", "chunked", "pd_split")
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

#: Configs that differ from the built-in ones in what could be read or computed wrongly.
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen3": QWEN3,
    "qwen3_biases_untied": QWEN3 | {"attention_bias": True, "tie_word_embeddings": False},
    "llama3_rope": LLAMA,
    "llama_rope_parameters": {k: v for k, v in LLAMA.items() if k not in ("rope_scaling", "rope_theta")}
    | {
        "rope_parameters": LLAMA["rope_scaling"] | {"rope_theta": 5000.0},
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama_linear_rope": LLAMA
    | {"rope_scaling": {"type": "linear", "factor": 4.0}, "num_key_value_heads": 8},
    "qwen2": {k: v for k, v in QWEN3.items() if k != "attention_bias"}
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "head_dim": 16,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
    },
}


@cache
def variant(name: str) -> Path:
    """A checkpoint of one of VARIANTS, written once a session."""
    directory = Path(tempfile.mkdtemp(prefix="headway-test-")) / name
    write_checkpoint(directory, VARIANTS[name], seed=sum(name.encode()))
    return directory


@cache
def reference(directory: Path) -> Any:
    """transformers' model, float32 on the CPU."""
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@cache
def reference_tokens(directory: Path, prompt: tuple[int, ...], count: int) -> list[int]:
    """What transformers' greedy generate answers."""
    prompts = torch.tensor([prompt])
    exactly = {
        "max_new_tokens": count,
        "min_new_tokens": count,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    out = reference(directory).generate(prompts, attention_mask=torch.ones_like(prompts), **exactly)
    return out[0, len(prompt) :].tolist()


def shared_prompts(vocab: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to 41 tokens; half of them begin alike, so that caches hit."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(vocab, (n,), generator=generator).tolist()  # noqa: E731
    head = draw(21)
    return [head + draw(3), draw(1), head + draw(20), draw(33), head + draw(9), draw(17), head, draw(6)]


@cache
def prepared(directory: Path, dtype: str | None = None) -> TorchExecutor:
    """A loaded model. `start` gives it a fresh cache for each engine, so that tests share it."""
    executor = TorchExecutor(device="cpu", kv_cache_gb=0.01)
    executor.prepare(ModelConfig(name_or_path=str(directory), dtype=dtype))
    return executor


def scheduler_of(name: str, chunk: int) -> tuple[Any, int]:
    """The scheduler that computes prompts `chunk` tokens at a time, and the step's token budget it needs for
    that."""
    if name == "chunked":
        # Started on a chunk, prompts are preempted before they are done: the harder case.
        return ChunkedPrefill(token_budget=None, chunk_size=chunk, admit_on="chunk"), 128
    if name == "pd_split":
        return TwoPhase(prefill_tokens=chunk), 128
    return PrefillFirst(), chunk


def engine_of(
    executor: TorchExecutor,
    scheduler: str = "chunked",
    cache: str = "hash",
    *,
    chunk: int = 64,
    seed: int = 0,
    **limits: Any,
) -> Engine:
    policy, budget = scheduler_of(scheduler, chunk)
    roles = default_roles(scheduler=policy, cache=CACHES[cache](), executor=executor)
    config = EngineConfig(
        **{
            "block_size": 4,
            "num_blocks": 256,
            "max_num_seqs": 8,
            "max_num_batched_tokens": budget,
            "check": True,
        }
        | limits
    )
    return Engine(roles, config, seed=seed, stop_text=executor.stop_text)


def generate(
    engine: Engine, prompts: list[list[int]], sampling: SamplingParams = GREEDY, spacing: float = 0.0
) -> list[list[int]]:
    """Output tokens in the order of the prompts."""
    result = engine.run([Arrival(i * spacing, p, sampling, id=f"p{i}") for i, p in enumerate(prompts)])
    assert [o.state for o in result.outputs] == ["finished"] * len(prompts)
    return [o.output_token_ids for o in result.outputs]


def smollm2() -> Path:
    return find_checkpoint("smollm2")
