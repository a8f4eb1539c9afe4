"""What config.json and generation_config.json of a Hugging Face checkpoint say: the one reader of both.

Values, defaults and precedences are those of transformers 5. What this code does not compute as transformers
does is refused with a ConfigError that names the field. No file is known here; `core/compose/checkpoint.py`
adds its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True)
class Family:
    """What transformers' config class of an architecture takes for fields that a config.json leaves out."""

    architecture: str
    max_position_embeddings: int = 2048
    num_key_value_heads: int | None = None  # None: as many as attention heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    even_heads: bool = False  # num_attention_heads must divide hidden_size
    head_dim_may_be_null: bool = False
    windows_by_layer: bool = False  # max_window_layers says where they begin; else all layers have one
    attention_bias: str = "flag"  # flag: q, k, v, o as the field says; qkv: those three always
    mlp_bias: bool = False  # the flag of that name is obeyed
    qk_norm: bool = False  # queries and keys are normed, head by head


LLAMA = Family(
    "LlamaForCausalLM", even_heads=True, head_dim_may_be_null=True, mlp_bias=True
)  # also how architectures without a model file are read, for the simulator
QWEN2 = Family("Qwen2ForCausalLM", 32768, num_key_value_heads=32, windows_by_layer=True, attention_bias="qkv")
QWEN3 = Family(
    "Qwen3ForCausalLM", 32768, num_key_value_heads=32, head_dim=128, windows_by_layer=True, qk_norm=True
)
FAMILIES = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}  # by model_type
ARCHITECTURES = {family.architecture: family for family in FAMILIES.values()}

#: The largest size that a decoder may have, with room: beyond it a number is a mistake, which would cost
#: hours or all memory.
LIMITS = {
    "hidden_size": 1 << 20,
    "num_hidden_layers": 1 << 11,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "intermediate_size": 1 << 22,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 24,
}
REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")

#: Fields that change what a model computes and that no model file here obeys -> values that change nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "compression_config": (None,),
    "transformers_weights": (None,),
    "per_layer_config": (None, {}),
    "text_config": (None,),
    "vision_config": (None,),
    "is_causal": (None, True),
    "is_encoder_decoder": (None, False),
    "use_bidirectional_attention": (None, False),
    "add_cross_attention": (None, False),
    "attention_chunk_size": (None,),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "n_routed_experts": (None, 0, 1),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "logit_softcapping": (None,),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "lm_head_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "scale_emb": (None, 1),
    "scale_depth": (None,),
}
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
YARN_OPTIONS = ("mscale", "mscale_all_dim", "beta_fast", "beta_slow")  # null and 0 count as absent
THETA_LIMIT = 1e15
INTEGER_LIMIT = 1 << 40  # for numbers that are no size


@dataclass(frozen=True)
class Rope:
    """Rotary embedding beyond its base (`ModelShape.rope_theta`). Names are Hugging Face's."""

    rope_type: str = "default"  # or linear, llama3, yarn; `dynamic` is default within the context
    factor: float = 1.0
    original_max_position_embeddings: int = 0  # llama3 and yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0  # yarn: multiplies cosines and sines
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class HFConfig:
    """A checkpoint's config, checked. `shape` holds the fields of ModelShape."""

    shape: Mapping[str, Any] = field(default_factory=dict)  # dtype is None where the config names none
    rope: Rope = field(default_factory=Rope)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    eos_token_ids: frozenset[int] = frozenset()


def read_hf(config: Mapping[str, Any]) -> HFConfig:
    """From the contents of config.json. Raises ConfigError that names the field."""
    architecture = architecture_of(config)
    family = ARCHITECTURES.get(architecture, LLAMA)
    for name, harmless in UNSUPPORTED.items():
        if name in config and config[name] not in harmless:
            raise ConfigError(f"{name}={_short(config[name])} is not supported: expected no such field")
    if missing := [name for name in REQUIRED if name not in config]:
        raise ConfigError(f"{architecture} lacks {', '.join(missing)}: expected a decoder's config")
    shape = _sizes(config, family)
    if _text(config, "hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"hidden_act={_short(config['hidden_act'])}: expected silu, the only one here")
    _check_windows(config, family, shape["num_hidden_layers"], shape["max_position_embeddings"])
    theta, rope = _rope(config, shape["max_position_embeddings"], shape["head_dim"])
    shape |= {
        "architecture": architecture,
        "tie_word_embeddings": _flag(config, "tie_word_embeddings"),
        "dtype": _dtype(config),
        "rope_theta": theta,
        "rms_norm_eps": _number(config, "rms_norm_eps", 1e-6, above=1e-20, below=1),
    }
    bias = family.attention_bias == "flag" and _flag(config, "attention_bias")
    return HFConfig(
        shape,
        rope,
        qkv_bias=bias or family.attention_bias == "qkv",
        o_bias=bias,
        mlp_bias=family.mlp_bias and _flag(config, "mlp_bias"),
        eos_token_ids=read_eos(config, shape["vocab_size"]),
    )


def architecture_of(config: Mapping[str, Any]) -> str:
    """The model class: that of `model_type`, as transformers chooses it, else the first of `architectures`.

    The two must not contradict each other.
    """
    kind, named = config.get("model_type"), config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ConfigError(f"architectures={_short(named)}: expected a list of names")
    if kind is not None and not isinstance(kind, str):
        raise ConfigError(f"model_type={_short(kind)}: expected a name")
    if kind is None and not named:
        raise ConfigError("neither model_type nor architectures is there: expected one of them")
    if kind not in FAMILIES:
        if kind and named and named[0] in ARCHITECTURES:
            raise ConfigError(f"model_type={kind!r} and architectures={_short(named)} contradict each other")
        return str(named[0] if named else kind)
    expected = FAMILIES[kind].architecture
    if not named or expected in named or expected.replace("ForCausalLM", "Model") in named:
        return expected
    if named[0] in ARCHITECTURES:
        raise ConfigError(f"model_type={kind!r} and architectures={_short(named)} contradict each other")
    return str(named[0])


# ---- fields ----------------------------------------------------------------------------------------------


def _sizes(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    sizes: dict[str, Any] = {name: _size(name, config[name]) for name in REQUIRED}
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    context = config.get("max_position_embeddings", family.max_position_embeddings)
    sizes["max_position_embeddings"] = _size("max_position_embeddings", context)
    kv_heads = config.get("num_key_value_heads", family.num_key_value_heads)
    kv_heads = _size("num_key_value_heads", heads if kv_heads is None else kv_heads)
    sizes["num_key_value_heads"] = kv_heads
    if heads % kv_heads:
        raise ConfigError(f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}")
    if family.even_heads and hidden % heads:
        raise ConfigError(f"hidden_size={hidden} is no multiple of num_attention_heads={heads}")
    head_dim = config.get("head_dim", family.head_dim)
    if head_dim is None and "head_dim" in config and not family.head_dim_may_be_null:
        raise ConfigError(f"head_dim=null: {family.architecture} expects a number, or no such field")
    sizes["head_dim"] = _size("head_dim", hidden // heads if head_dim is None else head_dim)
    if sizes["head_dim"] % 2:
        raise ConfigError(f"head_dim={sizes['head_dim']}: rotary embedding needs an even number")
    pad, vocab = _integer(config, "pad_token_id", None), sizes["vocab_size"]
    if pad is not None and not -vocab <= pad < vocab:
        raise ConfigError(f"pad_token_id={pad} is outside the vocabulary of {vocab} tokens")
    return sizes


def _check_windows(config: Mapping[str, Any], family: Family, layers: int, context: int) -> None:
    """Refuses sliding windows unless no layer has one, or it spans the whole context and changes nothing."""
    types, slides = config.get("layer_types"), False
    if types is not None:
        if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
            raise ConfigError(f"layer_types={_short(types)}: expected a list of names")
        if len(types) != layers:
            raise ConfigError(f"layer_types has {len(types)} entries, num_hidden_layers={layers}")
        if others := sorted(set(types) - {"full_attention", "attention", "sliding_attention"}):
            raise ConfigError(f"layer_types: {others[0]!r} is not supported, expected full_attention")
        slides = "sliding_attention" in types
    if family.windows_by_layer:
        window = _integer(config, "sliding_window", 4096)
        first = _integer(config, "max_window_layers", 28, null=False)
        if not _flag(config, "use_sliding_window"):
            window = None
        elif types is None:
            slides = window is not None and first is not None and first < layers
    else:
        window = _integer(config, "sliding_window", None)
        slides = slides or window is not None
    if slides and (window is None or not window >= context):
        raise ConfigError(
            f"sliding-window attention (sliding_window={window}) is not supported: "
            f"expected layers with full attention, or a window of at least the context of {context} tokens"
        )


def _rope(config: Mapping[str, Any], context: int, head_dim: int) -> tuple[float, Rope]:
    """(theta, the rest). `rope_scaling` goes before `rope_parameters`, a theta inside before one beside."""
    where = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    given = config.get(where) or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}={_short(given)}: expected an object")
    if nested := [name for name, value in given.items() if isinstance(value, Mapping)]:
        raise ConfigError(f"{where}.{nested[0]}: rotary embedding by kind of layer is not supported")
    place = given if "rope_theta" in given else config
    theta = _number(place, "rope_theta", 10000.0, above=1, below=THETA_LIMIT)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ConfigError(f"rope scaling {_short(kind)}: expected one of {', '.join(ROPE_TYPES)}")
    if kind == "default":
        return theta, Rope()  # a partial_rotary_factor is ignored here, as transformers does
    place = given if "partial_rotary_factor" in given else config
    part = 1.0 if place.get("partial_rotary_factor") is None else _number(place, "partial_rotary_factor")
    if int(head_dim * part) != head_dim:
        raise ConfigError(
            f"partial_rotary_factor={part} is not supported with rope type {kind!r}: expected 1.0"
        )
    if "factor" not in given:
        raise ConfigError(f"{where} of type {kind!r} lacks factor")
    if kind == "yarn":
        return theta, _yarn(given, _original(config, given, context), context)
    factor = _factor(given)
    if kind == "dynamic":
        return (
            theta,
            Rope(),
        )  # positions are scaled beyond max_position_embeddings only, where no request gets
    if kind == "linear":
        return theta, Rope("linear", factor)
    if missing := [name for name in ("low_freq_factor", "high_freq_factor") if name not in given]:
        raise ConfigError(f"{where} of type 'llama3' lacks {', '.join(missing)}")
    low, high = _number(given, "low_freq_factor", above=0), _number(given, "high_freq_factor", above=0)
    if high <= low:
        raise ConfigError(f"{where}: high_freq_factor={high} must be greater than low_freq_factor={low}")
    return theta, Rope("llama3", factor, _original(config, given, context), low, high_freq_factor=high)


def _original(config: Mapping[str, Any], given: Mapping[str, Any], context: int) -> int:
    """original_max_position_embeddings: the config's own field goes before the one of the rope parameters."""
    place = config if "original_max_position_embeddings" in config else given
    found = _integer(place, "original_max_position_embeddings", context, null=False)
    if found is None or found < 1:
        raise ConfigError(f"original_max_position_embeddings={found}: expected at least 1")
    return found


def _yarn(given: Mapping[str, Any], original: int, context: int) -> Rope:
    factor = context / original if given["factor"] is None else _factor(given)
    optional = {name: _number(given, name, above=0) for name in YARN_OPTIONS if given.get(name)}
    if given.get("attention_factor") is not None:
        attention = _number(given, "attention_factor", above=0)
    elif "mscale" in optional and "mscale_all_dim" in optional:
        attention = _mscale(factor, optional["mscale"]) / _mscale(factor, optional["mscale_all_dim"])
    else:
        attention = _mscale(factor)
    return Rope(
        "yarn",
        factor,
        original,
        attention_factor=attention,
        beta_fast=optional.get("beta_fast", 32.0),
        beta_slow=optional.get("beta_slow", 1.0),
        truncate=_flag(given, "truncate", default=True),
    )


def _factor(given: Mapping[str, Any]) -> float:
    return _number(given, "factor", above=1e-3, below=1e6)


def _mscale(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _dtype(config: Mapping[str, Any]) -> str | None:
    """`dtype` goes before its older name `torch_dtype`; None: neither is there."""
    for name in ("dtype", "torch_dtype"):
        if (found := config.get(name)) is not None:
            if found not in ("bfloat16", "float16", "float32", "float64"):
                types = "bfloat16, float16, float32 or float64"
                raise ConfigError(f"{name}={_short(found)}: expected {types}, or none and model.dtype")
            return str(found)
    return None


def read_eos(config: Mapping[str, Any], vocab: int) -> frozenset[int]:
    """The ids that end an answer, of config.json or generation_config.json.

    Ids outside the vocabulary never occur and are left out.
    """
    value = config.get("eos_token_id")
    found = value if isinstance(value, list) else [] if value is None else [value]
    if wrong := [id for id in found if isinstance(id, bool) or not isinstance(id, int)]:
        raise ConfigError(f"eos_token_id={_short(value)}: {_short(wrong[0])} is no token id, a whole number")
    return frozenset(id for id in found if 0 <= id < vocab)


# ---- values ----------------------------------------------------------------------------------------------


def _size(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LIMITS[name]:
        raise ConfigError(f"{name}={_short(value)}: expected a whole number from 1 to {LIMITS[name]}")
    return value


def _integer(config: Mapping[str, Any], name: str, default: int | None, null: bool = True) -> int | None:
    value = config.get(name, default)
    if value is None and null:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > INTEGER_LIMIT:
        raise ConfigError(f"{name}={_short(value)}: expected a whole number{' or null' if null else ''}")
    return value


def _number(
    config: Mapping[str, Any],
    name: str,
    default: float | None = None,
    above: float = -math.inf,
    below: float = 1e15,
) -> float:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < below:
        bound = f" > {above:g} and" if above > -math.inf else ""
        raise ConfigError(f"{name}={_short(value)}: expected a number{bound} < {below:g}")
    return float(value)


def _flag(config: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={_short(value)}: expected true or false")
    return value


def _text(config: Mapping[str, Any], name: str, default: str) -> str:
    value = config.get(name, default)
    if not isinstance(value, str):
        raise ConfigError(f"{name}={_short(value)}: expected a name")
    return value


def _short(value: Any) -> str:
    """For a message: not longer than a line, also of numbers with more digits than Python prints."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > INTEGER_LIMIT:
        return "a number of more than 12 digits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
