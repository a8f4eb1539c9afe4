"""One operation at a time: which backend runs which operation, checked when the engine is built.

A kernels config names a backend for each group of operations (`kernels=triton kernels.attention=flash_attn`).
`compose` asks every named backend whether it can run there, and hands back bound callables; nothing of the
choice is left in the layer loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from headway import ConfigError, near

from .ops import KernelBackend, KernelCaps

if TYPE_CHECKING:
    from torch import Tensor

    from .ops import BatchMetadata

#: Field of a kernels config -> the operations that it chooses.
GROUPS = {
    "attention": ("attention",),
    "linear": ("linear",),
    "norm": ("rms_norm", "add_rms_norm"),
    "rope": ("rotary",),
    "activation": ("silu_and_mul",),
    "store": ("store_kv",),
    "sampling": ("sample",),
    "batch": ("decode_inputs", "advance", "update_rows"),
}
#: Fused operation -> the operations that it follows from: the backend that runs all of these runs it too,
#: where it has it.
FUSED = {
    "qk_norm_rope_store": ("rms_norm", "rotary", "store_kv"),
    "gated_linear": ("linear", "silu_and_mul"),
    "linear_parts": ("linear", "add_rms_norm"),
    "sample_part": ("sample",),
}


@dataclass
class KernelChoice(KernelBackend):
    """The fields of every kernels config: a backend's name for each group of operations, and CUDA graphs.

    A backend subclasses this and sets the defaults that `kernels=<its name>` stands for."""

    attention: str = "torch"  # type: ignore[assignment]  # a name here, a callable in what `operations` answers
    decode: str | None = None  # attention of steps that are all decodes; None: as `attention`
    linear: str = "torch"  # type: ignore[assignment]
    norm: str = "torch"
    rope: str = "torch"
    activation: str = "torch"
    store: str = "torch"
    sampling: str = "torch"
    batch: str = "torch"
    cuda_graphs: bool = False

    def operations(self, device: str) -> Any:
        """The object that holds this backend's callables, made once per run. Raises ConfigError when a
        package is missing."""
        raise NotImplementedError

    def settled(
        self,
        backends: Callable[[str], KernelChoice],
        device: str,
        dtype: str,
        head_size: int,
        block_size: int,
    ) -> Settled:
        """With every field set, for a choice that depends on where it runs."""
        return Settled(self, [], [])


class Settled(NamedTuple):
    """A choice with every field set, and why it is this one."""

    choice: KernelChoice
    left_out: list[str]  # backends that cannot run here, with the reason: a line for each
    reasons: list[str]  # for what was chosen: a line for each group of operations, or for several


@dataclass
class GpuChoice(KernelChoice):
    """Triton for every operation that a subclass does not name another backend for."""

    attention: str = "triton"
    linear: str = "triton"
    norm: str = "triton"
    rope: str = "triton"
    activation: str = "triton"
    store: str = "triton"
    sampling: str = "triton"
    batch: str = "triton"


@dataclass(frozen=True)
class Kernels:
    """The composed backend: one bound callable an operation, signatures as in KernelBackend."""

    linear: Callable[..., Tensor]
    linear_parts: Callable[..., Tensor]
    gated_linear: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    rotary: Callable[..., tuple[Tensor, Tensor]]
    qk_norm_rope_store: Callable[..., Tensor]
    silu_and_mul: Callable[..., Tensor]
    store_kv: Callable[..., None]
    attention: Callable[..., Tensor]
    sample: Callable[..., Tensor]
    sample_part: Callable[..., tuple[Tensor, Tensor]] | None  # None: the backend of `sample` has none
    decode_inputs: Callable[..., tuple[Tensor, ...]]
    advance: Callable[..., None]
    update_rows: Callable[..., None]
    chosen: dict[str, str]  # operation -> backend's name, for the run's record
    caps: KernelCaps  # what every chosen backend allows together
    cuda_graphs: bool
    left_out: list[str]  # what could not be chosen here, and why
    reasons: list[str]  # why the others were

    def __str__(self) -> str:
        """One backend per group of operations, graphs, why, and what was left out."""
        by_backend: dict[str, list[str]] = {}
        for group in ("decode", *GROUPS):
            if name := self.chosen.get(GROUPS.get(group, (group,))[0]):
                by_backend.setdefault(name, []).append(group)
        words = [f"{name} ({', '.join(groups)})" for name, groups in by_backend.items()]
        return "\n  ".join(
            [
                ", ".join([*words, "CUDA graphs" if self.cuda_graphs else "no CUDA graphs"]),
                *self.reasons,
                *self.left_out,
            ]
        )


def check(name: str, caps: KernelCaps, device: str, dtype: str, head_size: int, block_size: int) -> None:
    """Raises ConfigError, with the reason and what to set instead, where a backend cannot run a model.

    device: "cpu" or "cuda"; dtype: "float32", "bfloat16" or "float16"; head_size in elements; block_size in
    tokens."""
    if device not in caps.devices:
        raise ConfigError(
            f"kernels: '{name}' runs on {_list(caps.devices)}, not on {device}. Set kernels=torch, or run on "
            f"{_list(caps.devices)}."
        )
    if dtype not in caps.dtypes:
        raise ConfigError(
            f"kernels: '{name}' supports {_list(caps.dtypes)}, not {dtype}. Set another dtype, or "
            "kernels=triton or kernels=torch."
        )
    if "attention" in caps.ops and caps.head_sizes is not None and head_size not in caps.head_sizes:
        raise ConfigError(
            f"kernels: '{name}' supports head sizes {_list(caps.head_sizes)}, the model has {head_size}. "
            f"Set kernels.attention=triton or kernels.attention=torch."
        )
    if "attention" in caps.ops and block_size % caps.block_size_multiple:
        raise ConfigError(
            f"kernels: '{name}' needs block sizes that are multiples of {caps.block_size_multiple}, not "
            f"{block_size}. "
            f"Set block_size={-(-block_size // caps.block_size_multiple) * caps.block_size_multiple}, or "
            "kernels.attention=triton."
        )


def compose(
    choice: KernelChoice,
    backends: Callable[[str], KernelChoice],
    device: str,
    dtype: str,
    head_size: int,
    block_size: int,
) -> Kernels:
    """Binds the operations that `choice` names. backends: name -> that backend's config object with its
    defaults.

    An operation that the named backend does not implement comes from `torch`."""
    choice, left_out, reasons = choice.settled(backends, device, dtype, head_size, block_size)
    made: dict[str, tuple[KernelCaps, Any]] = {}

    def backend(name: str) -> tuple[KernelCaps, Any]:
        if name not in made:
            role = choice if name == choice.plugin_name else backends(name)
            operations = role.operations(device)  # first: a missing package is the reason that helps most
            check(name, role.caps, device, dtype, head_size, block_size)
            made[name] = role.caps, operations
        return made[name]

    calls: dict[str, Callable[..., Any]] = {}
    chosen: dict[str, str] = {}
    for group, operations in GROUPS.items():
        name = getattr(choice, group)
        for operation in operations:
            chosen[operation] = name if operation in backend(name)[0].ops else "torch"
            calls[operation] = getattr(backend(chosen[operation])[1], operation)
    if choice.decode is not None and choice.decode != chosen["attention"]:
        if "attention" not in backend(choice.decode)[0].ops:
            raise ConfigError(
                f"kernels.decode={choice.decode}: that backend has no attention. Leave kernels.decode unset, "
                "or name another."
            )
        chosen["decode"] = choice.decode
        calls["attention"] = _by_step(calls["attention"], backend(choice.decode)[1].attention)
    for fused, operations in FUSED.items():
        names = {chosen[operation] for operation in operations}
        if len(names) == 1 and fused in backend(name := names.pop())[0].ops:
            chosen[fused], calls[fused] = name, getattr(backend(name)[1], fused)
        else:
            chosen[fused], calls[fused] = (
                "separate",
                SEPARATE[fused](*(calls[operation] for operation in operations)),
            )
    used = [made[name][0] for name in sorted(set(chosen.values()) - {"separate"})]
    if choice.cuda_graphs and not all(caps.graph_safe for caps in used):
        unsafe = [
            name for name in sorted(set(chosen.values()) - {"separate"}) if not made[name][0].graph_safe
        ]
        raise ConfigError(
            f"kernels.cuda_graphs=true: {_list(unsafe)} cannot be captured. Set kernels=triton, or "
            "kernels.cuda_graphs=false."
        )
    return Kernels(
        **calls,
        chosen=chosen,
        caps=_together(used),
        cuda_graphs=choice.cuda_graphs,
        left_out=left_out,
        reasons=reasons,
    )


def _by_step(attention: Callable[..., Tensor], decode: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One backend for steps that hold prompt tokens, another for steps of decodes."""

    def chosen(q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: BatchMetadata, scale: float) -> Tensor:
        return (decode if batch.max_seqlen_q == 1 else attention)(q, k_cache, v_cache, batch, scale)

    return chosen


def separate(rms_norm: Any, rotary: Any, store_kv: Any) -> Callable[..., Tensor]:
    """qk_norm_rope_store out of its parts, where they come from different backends."""

    def qk_norm_rope_store(
        qkv: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        positions: Tensor,
        cos_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        num_heads: int,
        num_kv_heads: int,
    ) -> Tensor:
        heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, -1)  # [T, H + 2K, D]
        q: Tensor
        q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        if q_weight is not None:
            q = rms_norm(q, q_weight, eps)
        if k_weight is not None:
            k = rms_norm(k, k_weight, eps)
        q, k = rotary(q, k, positions, cos_sin)
        store_kv(k, v, k_cache, v_cache, slot_mapping)
        return q

    return qk_norm_rope_store


def _gated_linear(linear: Any, silu_and_mul: Any) -> Callable[..., Tensor]:
    def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = silu_and_mul(linear(x, weight, bias))
        return out

    return gated_linear


SEPARATE: dict[str, Callable[..., Any]] = {
    "qk_norm_rope_store": separate,
    "gated_linear": _gated_linear,
    "linear_parts": lambda linear, add_rms_norm: linear,
    "sample_part": lambda sample: None,
}


def _together(used: list[KernelCaps]) -> KernelCaps:
    sizes = [caps.head_sizes for caps in used if caps.head_sizes is not None]
    return KernelCaps(
        devices=frozenset.intersection(*(caps.devices for caps in used)),
        dtypes=frozenset.intersection(*(caps.dtypes for caps in used)),
        head_sizes=frozenset.intersection(*sizes) if sizes else None,
        block_size_multiple=max(caps.block_size_multiple for caps in used),
        mixed_batches=all(caps.mixed_batches for caps in used),
        graph_safe=all(caps.graph_safe for caps in used),
        mixed_graphs=all(caps.mixed_graphs for caps in used),
        ops=frozenset.union(*(caps.ops for caps in used)),
    )


def lookup(backends: dict[str, Callable[[], KernelChoice]]) -> Callable[[str], KernelChoice]:
    """A `backends` argument for `compose` out of factories by name; an unknown name is answered with the
    known ones."""

    def find(name: str) -> KernelChoice:
        if name not in backends:
            raise ConfigError(f"kernels: no backend is called '{name}'.{near(name, backends)}")
        return backends[name]()

    return find


def _list(names: Any) -> str:
    return ", ".join(str(name) for name in sorted(names))
