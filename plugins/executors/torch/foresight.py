"""What a run on torch is refused for before weights, ranks or a download: device, model, kernels, split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from headway import EngineConfig, ModelConfig, ModelShape, ParallelConfig

from ...models import architecture
from ...models.spec import read_model
from .execution import check_weights, device_of, kernels_for

if TYPE_CHECKING:
    from ...kernels.compose import KernelChoice
    from .config import TorchConfig


def foresee(
    config: TorchConfig,
    model: ModelConfig,
    kernels: KernelChoice | None,
    *,
    engine: EngineConfig,
    backends: Callable[[str], KernelChoice] | None,
    parallel: ParallelConfig,
) -> ModelShape | None:
    """The shape that the model will have; None where only a download would tell.

    Raises ConfigError for a device, kernels or a split that cannot be, ModelError for a model that is not
    there.
    """
    device = device_of(config.device)
    shape = known_shape(model)
    if shape is None:
        return None
    architecture(shape.architecture)
    check_weights(device, model, shape)
    kernels_for(device.type, shape, kernels, backends=backends, block_size=engine.block_size)
    if parallel.world_size > 1:
        from ...parallel.config import MeshConfig
        from ...parallel.execution import Job
        from ...parallel.launch import check
        from ...parallel.mesh import check_fits

        check_fits(shape, parallel)
        if _is_here(model):
            check(Job(config, model, kernels, engine, 0, MeshConfig.of(parallel)))
    return shape


def known_shape(model: ModelConfig) -> ModelShape | None:
    """From the checkpoint where it is here, else from the `model` node; nothing is written, converted or
    downloaded."""
    if _is_here(model):
        return read_model(model).shape
    return model.shape() if model.has_shape else None


def _is_here(model: ModelConfig) -> bool:
    """Whether looking the model up takes neither a conversion nor the network; so it is for a name that can
    only be wrong."""
    if model.load_format == "dummy" and model.has_shape:
        return True
    name = model.name_or_path
    if Path(name).expanduser().exists():
        return True
    if "/" not in name and not name.startswith((".", "~")):
        # built in: its shape is in conf/model, its checkpoint is written by the run that needs it
        return not model.has_shape
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "~", "/"))
    return not is_hub_id or _is_offline()


def _is_offline() -> bool:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)
