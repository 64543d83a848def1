"""Which backend a model lives on: looked at once, when the projector is attached."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from digrap_scale.errors import ConfigError
from digrap_scale.sharding.base import Backend
from digrap_scale.sharding.ddp import DDPBackend
from digrap_scale.sharding.fsdp2 import FSDP2Backend
from digrap_scale.sharding.zero import Zero3Backend


def is_deepspeed_engine(model: Any) -> bool:
    """Whether ``model`` is a DeepSpeed engine (told by its class's name, so that DeepSpeed is imported by its users only)."""
    return any(cls.__name__ == "DeepSpeedEngine" for cls in type(model).__mro__)


def detect_backend(model: Any, optimizer: Optimizer | None) -> Backend:
    """The backend of a model or engine that is already wrapped.

    Raises:
        ConfigError: no optimizer where one is needed, or a wrapper that is not supported.
    """
    if is_deepspeed_engine(model):
        stage = model.zero_optimization_stage()
        if stage != 3:
            raise ConfigError(f"DeepSpeed ZeRO stage {stage} is not supported; set zero_optimization.stage to 3")
        return Zero3Backend(model)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"expected a torch module or a DeepSpeed engine, found {type(model).__name__}")
    if optimizer is None:
        raise ConfigError("an optimizer is needed for a plain, DDP or FSDP2 model (only a DeepSpeed engine brings its own)")
    if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(model).__mro__):
        raise ConfigError("FSDP1 (FullyShardedDataParallel) is not supported; shard with torch.distributed.fsdp.fully_shard")
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
