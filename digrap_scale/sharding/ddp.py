"""DistributedDataParallel: every rank holds the same reduced gradients, so statistics need no collective at all."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from digrap_scale.sharding.base import Backend


class DDPBackend(Backend):
    """Replicas: the same numbers on every rank, nothing to sum, nothing to count twice."""

    name = "ddp"

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        super().__init__(model.module if isinstance(model, DistributedDataParallel) else model, optimizer)
