"""How the training loop drives a model: wrapped, stepped and gathered again; one process here, and the base of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from digrap_scale.config.schema import Config, TrainingConfig
from digrap_scale.errors import ConfigError
from digrap_scale.sharding.base import unwrapped_name
from digrap_scale.sharding.materialize import materialize
from digrap_scale.types import Slices

MakeOptimizer = Callable[[nn.Module], Optimizer]


def portions(training: TrainingConfig, world_size: int) -> tuple[int, int]:
    """Samples of a micro-batch on one rank, and micro-batches of an optimizer step.

    Raises:
        ConfigError: batch sizes do not fit the world size.
    """
    share = (training.micro_batch_samples or 1) * world_size
    if training.global_batch_samples % share:
        raise ConfigError(
            f"training.global_batch_samples: expected a multiple of micro_batch_samples × processes = {share}, found "
            f"{training.global_batch_samples}"
        )
    micro = training.micro_batch_samples or training.global_batch_samples // world_size
    return micro, training.global_batch_samples // (micro * world_size)


class Engine:
    """One process, plain tensors.

    Attributes:
        module: the model itself.
        model: what is called with a batch's inputs: the module, wrapped.
        optimizer: holds the parameter groups whose learning rates the schedule sets.
        device: where batches go.
        accumulation_steps: micro-batches of one optimizer step.
        slices: reads the values of parameters that came on the meta device.
        skips_steps: whether it may skip a step (overflow) without calling the optimizer.
        lockstep: whether a forward needs all ranks, so that all must take the same number of them.
    """

    skips_steps = False
    lockstep = False

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        config: Config,
        device: torch.device,
        world_size: int,
        slices: Slices | None = None,
    ) -> None:
        self.device = device
        self.config = config
        self.world_size = world_size
        self.micro_batch_samples, self.accumulation_steps = portions(config.training, world_size)
        self.module = model
        self.slices = slices
        self._wrap(model, make_optimizer)

    def _wrap(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        materialize(model, self.slices, self.device)
        self.model: Any = model.to(self.device)
        self.optimizer: Any = make_optimizer(self.model)

    @property
    def attached_to(self) -> tuple[Any, Optimizer | None]:
        """What ``attach`` is given: model and optimizer, or a DeepSpeed engine and None."""
        return self.model, self.optimizer

    @property
    def max_grad_norm(self) -> float | None:
        """What ``attach`` is to clip to."""
        return self.config.training.max_grad_norm

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """Context of one micro-batch's forward and backward; ``last`` is the one before the optimizer's step."""
        return self._autocast()

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        if self.config.sharding.mixed_precision == "bfloat16":
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                yield
        else:
            yield

    def inference(self) -> AbstractContextManager[None]:
        """Context of a forward without gradients, with the training's precision."""
        return self._autocast()

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """A floating model input in the dtype that the wrapped model computes in."""
        return tensor

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of one micro-batch's mean loss."""
        (loss / self.accumulation_steps).backward()

    def step(self) -> None:
        """The optimizer's step, at the end of accumulation."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def generate(self, inputs: dict[str, torch.Tensor], settings: Any) -> torch.Tensor:
        """transformers' generation (``settings``: its GenerationConfig): ids of prompt and new tokens, [B, T]. Collective
        if ``lockstep``: a rank that is done goes on with forwards whose results nobody reads until all are.
        """
        generator: Any = self.module
        ids: torch.Tensor = generator.generate(
            **inputs, generation_config=settings, synced_gpus=self.lockstep and self.world_size > 1
        )
        return ids

    def dtypes(self) -> dict[str, torch.dtype]:
        """Names (of the unwrapped model's state) → the dtypes that its weights are saved in at the end."""
        return {unwrapped_name(name): tensor.dtype for name, tensor in self.module.state_dict().items()}

    def saved_buffers(self) -> dict[str, torch.Tensor]:
        """The buffers that the model's state has, by name; writing into them changes the model's."""
        saved = {unwrapped_name(name) for name in self.module.state_dict()}
        named = {unwrapped_name(name): buffer for name, buffer in self.module.named_buffers()}
        return {name: buffer for name, buffer in named.items() if name in saved}

    def frozen_values(self, name: str, start: int, stop: int, live: torch.Tensor) -> torch.Tensor:
        """Elements [start, stop) of a frozen parameter as the checkpoint has them; ``live`` are those that the model computes
        with."""
        return live

    def extra_state(self) -> dict[str, Any]:
        """Plain numbers that a resumed run needs besides (a loss scale)."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``extra_state``; what another engine saved is left out."""

    def native_writer(self) -> Callable[[Path], None] | None:
        """Writes the framework's own checkpoint into a folder (collective), where there is one beside ours."""
        return None

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Names (of the unwrapped model) → full tensors on the CPU; complete on rank 0, maybe empty elsewhere. Collective."""
        return {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}
