"""The registry of backends: which one a config asks for, and which one a model lives on already."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from digrap_scale.config.schema import Config
from digrap_scale.errors import ConfigError
from digrap_scale.sharding.base import Backend, refuse_optimizer
from digrap_scale.sharding.ddp import DDPBackend, DDPEngine
from digrap_scale.sharding.engine import Engine, MakeOptimizer
from digrap_scale.sharding.fsdp2 import FSDP2Backend, FSDP2Engine
from digrap_scale.sharding.zero_engine import ZeroEngine, zero_backend
from digrap_scale.types import Slices

ENGINES: dict[str, type[Engine]] = {
    "single": Engine,
    "ddp": DDPEngine,
    "fsdp2": FSDP2Engine,
    "zero1": ZeroEngine,
    "zero2": ZeroEngine,
    "zero3": ZeroEngine,
}


def build_engine(
    model: nn.Module,
    make_optimizer: MakeOptimizer,
    config: Config,
    device: torch.device,
    world_size: int,
    slices: Slices | None = None,
) -> Engine:
    """Wrap ``model`` as ``sharding.backend`` says.

    Parameters of ``model`` that are on the meta device get their values from ``slices``, by their names: under fsdp2
    and zero3 each rank holds its shards and, while it starts, one whole tensor at most.

    Raises:
        ConfigError: batch sizes do not fit the world size, or see the backend's engine.
    """
    return ENGINES[config.sharding.backend](model, make_optimizer, config, device, world_size, slices)


def is_deepspeed_engine(model: Any) -> bool:
    """Whether ``model`` is a DeepSpeed engine (told by its class's name, so that DeepSpeed is imported by its users only)."""
    return any(cls.__name__ == "DeepSpeedEngine" for cls in type(model).__mro__)


def detect_backend(model: Any, optimizer: Optimizer | None) -> Backend:
    """The backend of a model or engine that is already wrapped.

    Raises:
        ConfigError: no optimizer where one is needed, or a wrapper that is not supported.
    """
    if is_deepspeed_engine(model):
        return zero_backend(model)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"expected a torch module or a DeepSpeed engine, found {type(model).__name__}")
    if optimizer is None:
        raise ConfigError(
            "an optimizer is needed for a plain, DDP or FSDP2 model (only a DeepSpeed engine brings its own)"
        )
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner  # Accelerate's wrapper has no hooks of its own
    # torchtitan's container is an Optimizer, but neither its rates nor its state are those that are stepped with.
    if not isinstance(optimizer, Optimizer) or isinstance(getattr(optimizer, "optimizers", None), (list, tuple)):
        raise ConfigError(
            f"optimizer: expected one torch optimizer, found {type(optimizer).__name__}; "
            "of several, attach to each by itself"
        )
    refuse_optimizer(optimizer)
    while "_orig_mod" in model._modules:
        model = model._modules["_orig_mod"]  # torch.compile, maybe around DDP
    if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(model).__mro__):
        raise ConfigError(
            "FSDP1 (FullyShardedDataParallel) is not supported; shard with torch.distributed.fsdp.fully_shard"
        )
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return FSDP2Backend(model, optimizer)
    if isinstance(model, DistributedDataParallel):
        return DDPBackend(model, optimizer)
    return Backend(model, optimizer)


def unwrap(model: Any) -> nn.Module:
    """The module inside DDP, a DeepSpeed engine or ``torch.compile``."""
    while True:
        if isinstance(model, DistributedDataParallel) or is_deepspeed_engine(model):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            inner: nn.Module = model
            return inner
