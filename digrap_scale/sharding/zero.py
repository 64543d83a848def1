"""What DeepSpeed's ZeRO stages 1, 2 and 3 have in common, and which engines none of them can be seen through.

All of them hand the inner torch optimizer one flat float32 partition after the other (a "flat": one a parameter group in
stages 1 and 2, one a sub-group in stage 3). ω's normalisation needs every layer at once, so the first flat's hook takes
the statistics of all (the later ones' gradients are complete, but not yet unscaled: ``grad_scale``), with one all-reduce,
and each hook changes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from digrap_scale.errors import ConfigError
from digrap_scale.sharding.aliases import Aliases
from digrap_scale.sharding.base import (
    STEP,
    Backend,
    all_gather,
    all_reduce_,
    gather_intervals,
    unwrapped_name,
)
from digrap_scale.types import ShardSpec, ShardView


class Place(NamedTuple):
    """Where a layer's shard lies: number of its flat, offset there, place in the flat's list of layers, real elements."""

    flat: int
    offset: int
    position: int
    real: int


class ZeroBackend(Backend):
    """Views into an engine's flat float32 partitions; the stages say where those and their gradients are."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._zero = engine, engine.optimizer
        self._names = {id(p): unwrapped_name(name) for name, p in engine.module.named_parameters()}
        self.hooked = [self._zero.optimizer]
        self.specs = []
        self._copied = []
        self._dropped = []
        self._aliases = Aliases(self._zero.optimizer)
        self._place: list[Place] = []
        self._group: dist.ProcessGroup | None = None

    @property
    def _flats(self) -> list[torch.Tensor]:
        """The partitions that the inner optimizer steps, in the order in which it does."""
        raise NotImplementedError

    def _pending_gradient(self, layer: int) -> torch.Tensor | None:
        """[N] the layer's gradient as long as its flat has none: complete, reduced, not unscaled nor clipped."""
        raise NotImplementedError

    def _weight(self, layer: int) -> torch.Tensor:
        place = self._place[layer]
        return self._part("weight", layer, self._flats[place.flat])

    def _part(self, what: str, layer: int, flat: torch.Tensor) -> torch.Tensor:
        place = self._place[layer]
        part = self._aliases.flat(what, layer, flat, (place.offset, place.real))
        assert part is not None, f"a flat partition of strides {flat.stride()}"
        return part

    def weights(self) -> list[torch.Tensor]:
        return [self._weight(layer) for layer in range(len(self.specs))]

    def views(self, layers: Sequence[int] | None = None) -> list[ShardView]:
        active, pending_scale = self._active(), self._pending_scale()
        views = []
        for layer in range(len(self.specs)) if layers is None else layers:
            place = self._place[layer]
            flat_grad = self._flats[place.flat].grad
            if flat_grad is not None:
                grad: torch.Tensor | None = flat_grad.narrow(0, place.offset, place.real)
            else:
                grad = self._pending_gradient(layer)
            scale = 1.0 if place.flat in active else pending_scale
            lr = float(self.group(layer)["lr"])
            views.append(ShardView(self.specs[layer], self._weight(layer), grad, grad_scale=scale, lr=lr))
        return views

    def adam_moments(self, layers: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None]:
        found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None] = []
        for layer in layers:
            place = self._place[layer]
            state = self._zero.optimizer.state.get(self._flats[place.flat])
            if not state:
                found.append(None)
                continue
            first, second = (
                self._part("first", layer, state["exp_avg"]),
                self._part("second", layer, state["exp_avg_sq"]),
            )
            found.append((first, second, state[STEP]))
        return found

    def state_holder(self, layer: int) -> tuple[torch.Tensor, slice]:
        place = self._place[layer]
        return self._flats[place.flat], slice(place.offset, place.offset + place.real)

    def frozen(self, name: str, parameter: nn.Parameter) -> tuple[ShardSpec, torch.Tensor]:
        return ShardSpec(name, tuple(parameter.shape), 0, parameter.numel(), True), parameter.detach().reshape(-1)

    def copies(self, spec: ShardSpec) -> tuple[int, int]:
        return (dist.get_rank(), dist.get_world_size()) if spec.replicated else (0, 1)

    def _active(self) -> set[int]:
        """The flats that the inner optimizer was handed."""
        held = {p.data_ptr() for group in self._zero.optimizer.param_groups for p in group["params"]}
        active = {i for i, flat in enumerate(self._flats) if flat.data_ptr() in held and flat.numel() > 0}
        assert active, "the optimizer's step was handed none of the engine's partitions"
        return active

    def _pending_scale(self) -> float:
        """What unscaling and clipping will multiply a later flat's gradient with (DeepSpeed's unscale_and_clip_grads)."""
        scale = float(self._zero.loss_scale)
        if self._zero.clip_grad > 0:
            scale *= max(1.0, (self._scaled_norm() / scale + 1e-6) / self._zero.clip_grad)
        return 1.0 / scale

    def _scaled_norm(self) -> float:
        """The gradient norm with the loss scale still in it."""
        return float(self._zero._global_grad_norm) * float(self._zero.loss_scale)

    def stepped(self) -> Sequence[torch.Tensor]:
        return [self._flats[number] for number in sorted(self._active())]

    @property
    def shard_ranks(self) -> int:
        return dist.get_world_size(self._group)

    def stepping(self) -> Sequence[int]:
        active = self._active()
        return [layer for layer, place in enumerate(self._place) if place.flat in active]

    def first_of_step(self) -> bool:
        return 0 in self._active()

    def gather(self, layer: int, local: torch.Tensor) -> torch.Tensor:
        return gather_intervals(self.specs[layer], local, self._group)

    def process_groups(self) -> Sequence[dist.ProcessGroup | None]:
        return (self._group,)

    def reduce_(self, stats_LK: torch.Tensor, layers: Sequence[int]) -> None:
        all_reduce_(stats_LK, self._group)

    def each_rank(self, stats_LK: torch.Tensor) -> torch.Tensor:
        return all_gather(stats_LK, self._group)

    def drop_gradients(self, layers: Sequence[int] | None = None) -> None:
        # They are there again after the step: with an offloaded optimizer their memory is the engine's own buffer.
        active = self._active()
        wanted = active if layers is None else {self._place[layer].flat for layer in layers} & active
        for number in sorted(wanted):
            self._drop(self._flats[number])

    def together(self, layers: Collection[int]) -> tuple[int, int] | None:
        inside = {self._place[layer].flat: layer for layer in layers}
        for layer, place in enumerate(self._place):
            if layer not in layers and place.flat in inside:
                return inside[place.flat], layer
        return None

    def watch_gradients(self, there: Callable[[int], None]) -> list[Any]:
        raise ConfigError(
            "statistics during backward: DeepSpeed does not tell when a gradient is reduced; set training.statistics: step"
        )

    def check_optimizer(self) -> None:
        """An engine's partitions are made once."""

    def grad_norm_before_clipping(self) -> float | None:
        norm = self._zero._global_grad_norm
        # None: zero_optimization.compute_grad_norm is false; -1: DeepSpeed's mark for a norm that is not finite.
        return None if norm is None or float(norm) < 0 else float(norm)

    def _on_any_rank(self, local: set[str]) -> list[str]:
        """The layers that are named on any rank, in order. Collective."""
        flags = torch.tensor([spec.name in local for spec in self.specs], dtype=torch.int32)
        flags = flags.to(self._flats[0].device)
        all_reduce_(flags, self._group)
        return [spec.name for spec, flag in zip(self.specs, flags.tolist(), strict=True) if flag]


# Subclasses of DeepSpeed's optimizers that keep masters or gradients elsewhere, and what to change in the config.
_OTHER_OPTIMIZERS = {
    "SuperOffloadOptimizer_Stage3": "SuperOffload is not supported; remove super_offload from offload_optimizer",
    "MiCS_Optimizer": "MiCS is not supported; remove zero_optimization.mics_shard_size",
    "FP16_Optimizer": "half precision without ZeRO is not supported; set zero_optimization.stage to 1, 2 or 3",
    "FP16_UnfusedOptimizer": "half precision without ZeRO is not supported; set zero_optimization.stage to 1, 2 or 3",
    "DeepSpeedZeRoOffload": "the engine has no optimizer; pass one to deepspeed.initialize",
}
_SUPPORTED = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer")
_COMPRESSED = ("OnebitAdam", "OnebitLamb", "ZeroOneAdam")


def check_engine(engine: Any) -> None:
    """Refuse an engine whose gradients or partitions cannot be seen in its optimizer's step hooks.

    Raises:
        ConfigError: which part of its config, and what to change.
    """
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    prefix = f"DeepSpeed ZeRO stage {stage}: "
    if any(cls.__name__ == "PipelineEngine" for cls in type(engine).__mro__):
        raise ConfigError("DeepSpeed's pipeline engine is not supported; pass the model without PipelineModule")
    if zero is None or type(zero).__name__ == "DummyOptim":
        raise ConfigError(f"{prefix}the engine has no optimizer; pass one to deepspeed.initialize")
    if getattr(zero, "zenflow", False):
        raise ConfigError(f"{prefix}ZenFlow is not supported; remove zero_optimization.zenflow")
    kind = type(zero).__name__
    if kind in _OTHER_OPTIMIZERS:
        raise ConfigError(prefix + _OTHER_OPTIMIZERS[kind])
    if stage > 0 and kind not in _SUPPORTED:
        raise ConfigError(f"{prefix}its optimizer {kind} is not supported; expected one of {', '.join(_SUPPORTED)}")
    inner = zero.optimizer if stage > 0 else zero
    name = type(inner).__name__
    if name in _COMPRESSED:
        raise ConfigError(f"{prefix}{name} reduces gradients in its own step; use torch's AdamW")
    if "muon" in name.lower():
        raise ConfigError(f"{prefix}{name} replaces gradients before the step; use torch's AdamW")
    if getattr(engine, "has_moe_layers", False):
        raise ConfigError(f"{prefix}expert parallelism is not supported; use a model without deepspeed.moe layers")
    if _tensor_parallel(engine):
        raise ConfigError(f"{prefix}tensor parallelism is not supported; remove mpu and tensor_parallel")
    if getattr(zero, "swap_optimizer", False):
        raise ConfigError(
            f"{prefix}optimizer state offloaded to NVMe is not supported; set offload_optimizer.device to cpu"
        )
    if getattr(zero, "offload_optimizer", False) and getattr(zero, "partial_offload", 1.0) < 1.0:
        raise ConfigError(f"{prefix}partial optimizer offload is not supported; set offload_optimizer.ratio to 1.0")
    if getattr(zero, "torch_autocast_gradscaler", None) or getattr(engine, "torch_autocast_z0_gradscaler", None):
        raise ConfigError(
            f"{prefix}torch_autocast in float16 scales every group by itself on every rank; set torch_autocast.dtype to "
            "bfloat16, or use the fp16 section"
        )


def _tensor_parallel(engine: Any) -> bool:
    size = getattr(engine, "autotp_size", None)
    return getattr(engine.optimizer, "model_parallel_world_size", 1) > 1 or (size is not None and size() > 1)
