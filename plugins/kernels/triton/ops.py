"""The Triton backend's callables, one an operation; contracts as in `plugins/kernels/ops.py`."""

from .attention import attention
from .batch import advance, decode_inputs, update_rows
from .linear import gated_linear, linear, linear_parts
from .norm import add_rms_norm, rms_norm, silu_and_mul
from .rope import qk_norm_rope_store, rotary, store_kv
from .sampling import sample, sample_part

__all__ = [
    "add_rms_norm",
    "advance",
    "attention",
    "decode_inputs",
    "gated_linear",
    "linear",
    "linear_parts",
    "qk_norm_rope_store",
    "rms_norm",
    "rotary",
    "sample",
    "sample_part",
    "silu_and_mul",
    "store_kv",
    "update_rows",
]
