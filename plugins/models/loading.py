"""Weights into a model: names and shapes are checked against the files' headers first, then memory is taken,
then bytes are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from headway import ConfigError, ModelError, check_fits, checkpoint

from . import architecture
from .layers import CausalLM, PackedLinear, RMSNorm
from .spec import ModelSpec

if TYPE_CHECKING:
    from ..kernels.compose import Kernels

IGNORED = ("rotary_emb.inv_freq",)  # endings of tensors that old checkpoints carry and nobody needs
FLOATS = ("F64", "F32", "F16", "BF16")  # what is converted to the model's dtype
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # one tensor when tied, under either name


class Target(NamedTuple):
    """Where a checkpoint's tensor goes: rows [first, first + shape[0]) of a parameter."""

    parameter: str
    first: int
    shape: tuple[int, ...]


class Share(Protocol):
    """A rank's part of every tensor, for a parallel plan that has made the model's parameters smaller before
    they are loaded."""

    def full_shape(self, name: str, local: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the checkpoint must have for this tensor of which we hold `local`."""

    def take(self, name: str, tensor: Any) -> Tensor:
        """This rank's part of a safetensors slice (`tensor[a:b]` reads only that)."""

    def owns(self, name: str) -> bool:
        """False for tensors of layers that another rank holds."""


class Whole:
    """No parallel plan: every tensor in full."""

    def full_shape(self, name: str, local: tuple[int, ...]) -> tuple[int, ...]:
        return local

    def take(self, name: str, tensor: Any) -> Tensor:
        whole: Tensor = tensor[:]
        return whole

    def owns(self, name: str) -> bool:
        return True


def build(spec: ModelSpec, kernels: Kernels) -> CausalLM:
    """The model without memory (on torch's meta device): to be cut or sharded by name, then loaded."""
    if spec.shape.dtype.startswith("float8"):
        raise ModelError(
            f"model.dtype={spec.shape.dtype} is the simulator's: expected bfloat16, float16 or float32"
        )
    with torch.device("meta"):
        model: CausalLM = architecture(spec.shape.architecture)(spec, kernels)
    model.to(getattr(torch, spec.shape.dtype))
    return model.eval().requires_grad_(False)


def load(model: CausalLM, device: torch.device, share: Share | None = None, seed: int = 0) -> None:
    """Materialises the parameters on `device` and fills them.

    Raises ModelError before any memory is taken, but for values that are no numbers.
    """
    spec, share = model.spec, share or Whole()
    tied = spec.shape.tie_word_embeddings
    files = {} if spec.random_weights else open_checkpoint(spec.directory or Path(), tied)
    wanted = targets(model)
    if not spec.random_weights:
        check(wanted, files, share, spec)
    _check_memory(model, device)
    _materialise(model, device)
    parameters = dict(model.named_parameters())
    if spec.random_weights:
        _fill_random(model, device, seed)
    for name, target in wanted.items() if files else ():
        place = parameters[target.parameter][target.first : target.first + target.shape[0]]
        try:
            place.copy_(share.take(name, files[name].slice))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ModelError(f"tensor {name!r} cannot be read from {files[name].path}: {error}") from None
        _check_finite(place, name, files[name].path)
    model.bind(device)


def targets(model: nn.Module) -> dict[str, Target]:
    """Checkpoint name -> its place in the model."""
    found: dict[str, Target] = {}
    tied = isinstance(model, CausalLM) and model.spec.shape.tie_word_embeddings
    for prefix, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            name, shape = f"{prefix}.{kind}", tuple(parameter.shape)
            if tied and name == "lm_head.weight":
                continue
            if isinstance(module, PackedLinear):
                first = 0
                for part, rows in module.parts.items():
                    found[f"{prefix.rpartition('.')[0]}.{part}.{kind}"] = Target(
                        name, first, (rows, *shape[1:])
                    )
                    first += rows
            else:
                found[name] = Target(name, 0, shape)
    return found


class Stored(NamedTuple):
    """A tensor of an open safetensors file."""

    path: Path
    slice: Any  # `slice[a:b]` reads only that
    dtype: str


def open_checkpoint(directory: Path, tied: bool = False) -> dict[str, Stored]:
    """By the model's names, what the files hold. A tied checkpoint may hold its table as the head alone."""
    found, opened = {}, {}
    for name, tensor in checkpoint.find_tensors(directory).items():
        try:
            if tensor.path not in opened:
                opened[tensor.path] = safe_open(tensor.path, framework="pt", device="cpu")
            found[name] = Stored(tensor.path, opened[tensor.path].get_slice(tensor.name), tensor.dtype)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{tensor.path} cannot be read: {error}") from None
    if tied and HEAD in found:
        found.setdefault(EMBEDDING, found[HEAD])
    return found


def check(wanted: dict[str, Target], files: dict[str, Stored], share: Share, spec: ModelSpec) -> None:
    """Every tensor is there, has the right shape and holds floating-point numbers, and none is left over."""
    where = f"checkpoint {spec.directory}"
    for name, target in wanted.items():
        expected = share.full_shape(name, target.shape)
        if name not in files:
            missing = [n for n in wanted if n not in files]
            raise ModelError(
                f"{where}: tensor {name!r} is missing, expected shape {list(expected)} ({len(missing)} "
                f"missing of {len(wanted)})"
            )
        if files[name].dtype not in FLOATS:
            held = f"{files[name].path}: tensor {name!r} holds {files[name].dtype}"
            raise ModelError(f"{held}: quantized weights are not supported, expected {', '.join(FLOATS)}")
        found = tuple(files[name].slice.get_shape())
        if found != expected:
            raise ModelError(
                f"{where}: tensor {name!r} has shape {list(found)}, config.json asks for {list(expected)}"
            )
    extra = files.keys() - wanted.keys() - {EMBEDDING, HEAD}
    left = sorted(name for name in extra if not name.endswith(IGNORED) and share.owns(name))
    if left:
        raise ModelError(
            f"{where}: tensor {left[0]!r} has no place in {spec.shape.architecture} as config.json describes "
            f"it ({len(left)} such tensors): "
            "the checkpoint and its config.json do not belong together"
        )


def _check_finite(tensor: Tensor, name: str, path: Path) -> None:
    """One pass: a sum is finite unless a value is not, or the sum overflows, and then the extremes tell."""
    if torch.isfinite(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))):
        return
    if not all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        held = str(tensor.dtype).removeprefix("torch.")
        text = f"tensor {name!r} in {path} has values that are NaN or infinite as {held}"
        raise ModelError(f"{text}: the checkpoint is damaged, or too wide for model.dtype={held}")


def _check_memory(model: CausalLM, device: torch.device) -> None:
    shape = model.spec.shape
    need = sum(p.numel() * p.element_size() for p in model.parameters())
    context = f"model.max_position_embeddings={shape.max_position_embeddings}: the table of rotary embeddings"
    table = 4 * shape.max_position_embeddings * shape.head_dim
    check_fits(2 * table, context, "set a shorter context")  # twice while it is made
    need += table
    mend = "set a smaller model, model.dtype=bfloat16, or more GPUs with parallel.tp"
    if device.type != "cuda":
        check_fits(need, "the model's weights", mend)
    elif need > (free := torch.cuda.mem_get_info(device)[0]):
        raise ConfigError(
            f"the weights take {need / 2**30:.1f} GiB, {device} has {free / 2**30:.1f} GiB free: {mend}"
        )


def _materialise(model: nn.Module, device: torch.device) -> None:
    """Like `to_empty`, but a tied parameter stays one."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(
                    torch.empty_like(parameter, device=device), requires_grad=False
                )
            setattr(module, name, made[id(parameter)])


def _fill_random(model: nn.Module, device: torch.device, seed: int) -> None:
    """Norms at 1, biases at 0, matrices at the usual 0.02: no activation over- or underflows."""
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, RMSNorm):
                parameter.fill_(1.0)
            elif name == "bias":
                parameter.zero_()
            else:
                parameter.normal_(std=0.02, generator=generator)
