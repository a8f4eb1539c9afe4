"""The fastest kernels that can run here, operation by operation.

The order was measured on H100s and H200s (docs/kernels.md): FlashAttention is ahead in prompts, Triton in
decodes and in everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from headway import ConfigError, Registry, hookimpl

from .compose import GROUPS, KernelChoice, Settled, check


@dataclass
class AutoKernels(KernelChoice):
    """The fastest kernels that can run here: FlashAttention for prompts and Triton for the rest, in CUDA
    graphs; plain torch on a CPU.

    A field that is given is used as it is; None is what suits the device, the dtype, the head size and the
    block size."""

    attention: str | None = None  # type: ignore[assignment]  # None is for `settled` alone
    linear: str | None = None  # type: ignore[assignment]
    norm: str | None = None  # type: ignore[assignment]
    rope: str | None = None  # type: ignore[assignment]
    activation: str | None = None  # type: ignore[assignment]
    store: str | None = None  # type: ignore[assignment]
    sampling: str | None = None  # type: ignore[assignment]
    batch: str | None = None  # type: ignore[assignment]
    cuda_graphs: bool | None = None  # type: ignore[assignment]

    plugin_name = "auto"

    def settled(
        self,
        backends: Callable[[str], KernelChoice],
        device: str,
        dtype: str,
        head_size: int,
        block_size: int,
    ) -> Settled:
        """The choice with every field set, what was left out, and why."""
        given = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        left_out: list[str] = []

        def able(name: str) -> bool:
            try:
                role = backends(name)
                role.operations(device)  # says which package is missing
                check(name, role.caps, device, dtype, head_size, block_size)
            except ConfigError as error:
                left_out.append(f"no {name}: {error}")
                return False
            # a package that was built for another torch, or for another GPU
            except (ImportError, OSError) as error:
                left_out.append(f"no {name}: it is installed and cannot be imported ({error})")
                return False
            return True

        found = {name for name in ("triton", "flash_attn") if device == "cuda" and able(name)}
        fastest = _fastest(found)
        if ATTENTION in given:
            del fastest[DECODE]  # who names one kernel for attention means all of it
        settled = KernelChoice(
            **{group: backend.name for group, backend in fastest.items()}
            | {"cuda_graphs": "triton" in found}
            | given
        )
        if settled.decode == settled.attention:
            settled.decode = None
        settled.plugin_name = self.plugin_name
        return Settled(settled, left_out, _reasons(fastest, given, device, "triton" in found))


class Backend(NamedTuple):
    name: str
    why: str


ATTENTION, DECODE = "attention", "decode"
REST = tuple(group for group in GROUPS if group != ATTENTION)


def _fastest(found: set[str]) -> dict[str, Backend]:
    """For each group of operations, out of those that can run here; plain torch always can."""
    rest = (
        Backend("triton", "faster than plain torch")
        if "triton" in found
        else Backend("torch", "nothing faster can run")
    )
    prompts, decodes = rest, rest
    if "flash_attn" in found:
        prompts = Backend(
            "flash_attn", "ahead of triton in prompts" if "triton" in found else "ahead of plain torch"
        )
        decodes = Backend("triton", "ahead of flash_attn in decodes") if "triton" in found else prompts
    return {ATTENTION: prompts, DECODE: decodes} | dict.fromkeys(REST, rest)


def _reasons(fastest: dict[str, Backend], given: dict[str, Any], device: str, graphs: bool) -> list[str]:
    """Groups that one backend runs for one reason share a line."""
    if device != "cuda" and not given:
        return [f"plain torch for everything: the model runs on {device}"]
    lines: dict[Backend, list[str]] = {}
    for group, backend in fastest.items():
        if group not in given:
            lines.setdefault(backend, []).append(group)
    said = [f"{', '.join(groups)}: {name}, {why}" for (name, why), groups in lines.items()]
    said += [f"{group}: {value}, as given" for group, value in given.items()]
    if device == "cuda" and not graphs and "cuda_graphs" not in given:
        said.append(
            "no CUDA graphs: without triton only decodes can be captured; kernels.cuda_graphs=true does so"
        )
    return said


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("kernels", "auto", AutoKernels)
