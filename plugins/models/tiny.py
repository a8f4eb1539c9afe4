"""Small random checkpoints, written from code in the format of real ones, so that loading them is the real
loading."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOCAB_SIZE = 512
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% "
    "endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,  # not hidden_size / heads, as in Qwen3-0.6B
    "intermediate_size": 256,
    "vocab_size": VOCAB_SIZE,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "bos_token_id": None,
    "eos_token_id": 258,
    "pad_token_id": 256,
    "dtype": "float32",
}

LLAMA: dict[str, Any] = QWEN3 | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "head_dim": 16,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        # so that short prompts in tests already reach the scaled frequencies
        "original_max_position_embeddings": 64,
    },
}


def write_qwen3(directory: Path) -> None:
    write_checkpoint(directory, QWEN3)


def write_llama(directory: Path) -> None:
    write_checkpoint(directory, LLAMA)


def write_checkpoint(directory: Path, config: dict[str, Any], seed: int = 0) -> None:
    """config.json, model.safetensors (float32, random from `seed`), tokenizer.json, tokenizer_config.json."""
    import numpy as np
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in _shapes(config):
        # Wide enough that logits differ clearly, and norms and biases that do something.
        noise = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.1)
        weights[name] = noise + np.float32(1) if name.endswith("norm.weight") else noise
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(directory)


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    qwen2, qwen3 = config["model_type"] == "qwen2", config["model_type"] == "qwen3"
    rows, kv_rows = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    bias = config.get("attention_bias", False)
    linear = {
        "self_attn.q_proj": (rows, hidden, bias or qwen2),
        "self_attn.k_proj": (kv_rows, hidden, bias or qwen2),
        "self_attn.v_proj": (kv_rows, hidden, bias or qwen2),
        "self_attn.o_proj": (hidden, rows, bias and not qwen2),
        "mlp.gate_proj": (inner, hidden, config.get("mlp_bias", False)),
        "mlp.up_proj": (inner, hidden, config.get("mlp_bias", False)),
        "mlp.down_proj": (hidden, inner, config.get("mlp_bias", False)),
    }
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        if qwen3:
            yield f"{layer}.self_attn.q_norm.weight", (size,)
            yield f"{layer}.self_attn.k_norm.weight", (size,)
        for name, (outputs, inputs, has_bias) in linear.items():
            yield f"{layer}.{name}.weight", (outputs, inputs)
            if has_bias:
                yield f"{layer}.{name}.bias", (outputs,)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE of exactly VOCAB_SIZE tokens: every byte, the special tokens, and pairs. Any text
    comes back unchanged."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for token in SPECIAL:
        vocab[token] = len(vocab)
    merges = []
    for first, second in _pairs():
        if len(vocab) < VOCAB_SIZE and first + second not in vocab:
            merges.append((first, second))
            vocab[first + second] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _pairs() -> Iterator[tuple[str, str]]:
    """Two-letter pieces of English, then pairs of digits."""
    space = chr(0x120)  # how byte-level BPE writes a blank
    common = "etaoinshrdlu"
    yield from ((space, letter) for letter in "abcdefghijklmnopqrstuvwxyz")
    yield from ((a, b) for a in common for b in common)
    yield from ((a, b) for a in "0123456789" for b in "0123456789")
