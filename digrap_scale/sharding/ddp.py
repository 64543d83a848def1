"""DistributedDataParallel: every rank holds the same reduced gradients, so statistics need no collective at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from digrap_scale.errors import ConfigError
from digrap_scale.sharding.base import Backend
from digrap_scale.sharding.engine import Engine, MakeOptimizer
from digrap_scale.sharding.materialize import materialize
from digrap_scale.types import ShardSpec


class DDPBackend(Backend):
    """Replicas: the same numbers on every rank, nothing to sum, nothing to count twice."""

    name = "ddp"

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        super().__init__(model.module if isinstance(model, DistributedDataParallel) else model, optimizer)

    def copies(self, spec: ShardSpec) -> tuple[int, int]:
        return dist.get_rank(), dist.get_world_size()

    def process_groups(self) -> Sequence[dist.ProcessGroup | None]:
        return (None,)

    def watch_gradients(self, there: Callable[[int], None]) -> list[Any]:
        raise ConfigError(
            "statistics during backward: DDP does not tell when a gradient is reduced; set training.statistics: step"
        )


class DDPEngine(Engine):
    """DDP; gradients are reduced in the last micro-batch only."""

    def _wrap(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        materialize(model, self.slices, self.device)
        model = model.to(self.device)
        self.optimizer = make_optimizer(model)
        # Vision towers often have layers that the loss does not reach (a last layer that is not used, a pooling head).
        self.model = DistributedDataParallel(model, find_unused_parameters=True)

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        return self._micro_step(last)

    @contextmanager
    def _micro_step(self, last: bool) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self._autocast())
            if not last:
                stack.enter_context(self.model.no_sync())
            yield

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().cpu() for name, tensor in self.model.module.state_dict().items()}
