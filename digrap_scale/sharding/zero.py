"""DeepSpeed ZeRO-3: flat fp32 partitions, one optimizer step per sub-group.

``engine.step()`` unscales, clips and steps one sub-group after the other, handing the inner torch optimizer one flat
partition at a time. ω's normalisation needs every layer at once, so the first sub-group's hook takes the statistics of
all (the later ones' gradients are complete, but not yet unscaled: ``grad_scale``), and each hook changes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from digrap_scale.errors import ConfigError
from digrap_scale.sharding.base import Backend, all_reduce_, gather_intervals, nonfinite_names, unwrapped_name
from digrap_scale.sharding.engine import Engine, MakeOptimizer
from digrap_scale.sharding.materialize import OneAtATime, fill_, read_whole
from digrap_scale.types import ShardSpec, ShardView


class Zero3Backend(Backend):
    """Views into the engine's fp32 partitions.

    DeepSpeed's public ``safe_get_local_*`` functions give copies for offloaded state and nothing for a sub-group whose
    gradient is being stepped, so the optimizer's own lists are read: ``fp16_groups`` (parameters per sub-group),
    ``fp32_partitioned_groups_flat``, ``averaged_gradients``, ``sub_group_to_group_id``. tests/sharding pin them against
    the public functions.

    Raises:
        ConfigError: an engine setup whose partitions cannot be seen (NVMe offload, partial offload, ZenFlow).
    """

    name = "zero3"

    def __init__(self, engine: Any) -> None:
        zero = engine.optimizer
        self._engine, self._zero = engine, zero
        names = {id(p): unwrapped_name(name) for name, p in engine.module.named_parameters()}
        self._check(zero)
        self.hooked = [zero.optimizer]
        self._copied = []
        self._dropped: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self.specs = []
        # Of each layer: its sub-group, its offset there, its place in the sub-group's list, its real elements.
        self._place: list[tuple[int, int, int, int]] = []
        self._group: Any = None
        for sub_group, parameters in enumerate(zero.fp16_groups):
            offset = 0
            for position, parameter in enumerate(parameters):
                partition = parameter.partition_numel()
                self._group = parameter.ds_process_group
                rank = dist.get_rank(self._group)
                # Partitions are padded to one size with memory that was never written: real elements only.
                start = min(rank * partition, parameter.ds_numel)
                stop = min(start + partition, parameter.ds_numel)
                self.specs.append(ShardSpec(names[id(parameter)], tuple(parameter.ds_shape), start, stop))
                self._place.append((sub_group, offset, position, stop - start))
                offset += partition
        if not self.specs:
            raise ConfigError("zero3: the engine's optimizer trains no parameter: nothing to attach to")

    @staticmethod
    def _check(zero: Any) -> None:
        if getattr(zero, "swap_optimizer", False):
            raise ConfigError(
                "zero3: optimizer state offloaded to NVMe is not supported; use offload_optimizer.device: cpu"
            )
        if getattr(zero, "zenflow", False):
            raise ConfigError("zero3: ZenFlow is not supported; remove zero_optimization.zenflow")
        if getattr(zero, "offload_optimizer", False) and getattr(zero, "partial_offload", 1.0) < 1.0:
            raise ConfigError("zero3: partial optimizer offload is not supported; set offload_optimizer.ratio to 1.0")

    def weights(self) -> list[torch.Tensor]:
        return [
            self._zero.fp32_partitioned_groups_flat[sub_group].detach().narrow(0, offset, real)
            for sub_group, offset, _, real in self._place
        ]

    def views(self, layers: Sequence[int] | None = None) -> list[ShardView]:
        active = self._active_sub_group()
        pending_scale = self._pending_scale()
        views = []
        for layer in range(len(self.specs)) if layers is None else layers:
            spec, (sub_group, offset, position, real) = self.specs[layer], self._place[layer]
            flat = self._zero.fp32_partitioned_groups_flat[sub_group]
            weight = flat.detach().narrow(0, offset, real)
            if flat.grad is not None:
                grad = flat.grad.narrow(0, offset, real)
            else:
                grads = self._zero.averaged_gradients.get(sub_group)
                grad = None if grads is None else grads[position].view(-1).narrow(0, 0, real)
            lr = self._zero.optimizer.param_groups[self._zero.sub_group_to_group_id[sub_group]]["lr"]
            views.append(
                ShardView(spec, weight, grad, grad_scale=1.0 if sub_group == active else pending_scale, lr=float(lr))
            )
        return views

    def adam_moments(self, layers: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None]:
        found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None] = []
        for layer in layers:
            sub_group, offset, _, real = self._place[layer]
            state = self._zero.optimizer.state.get(self._zero.fp32_partitioned_groups_flat[sub_group])
            if not state:
                found.append(None)
                continue
            first, second = (state[key].narrow(0, offset, real) for key in ("exp_avg", "exp_avg_sq"))
            found.append((first, second, state["step"]))
        return found

    def group(self, layer: int) -> dict[str, Any]:
        group: dict[str, Any] = self._zero.optimizer.param_groups[
            self._zero.sub_group_to_group_id[self._place[layer][0]]
        ]
        return group

    def _active_sub_group(self) -> int:
        """The sub-group whose flat partition the inner optimizer was handed."""
        held = {p.data_ptr() for group in self._zero.optimizer.param_groups for p in group["params"]}
        flats = self._zero.fp32_partitioned_groups_flat
        active = [i for i, flat in enumerate(flats) if flat.data_ptr() in held and flat.numel() > 0]
        assert len(active) == 1, f"expected one sub-group in the optimizer's step, found {active}"
        return active[0]

    def _pending_scale(self) -> float:
        """What unscaling and clipping will multiply a later sub-group's gradient with (stage3.unscale_and_clip_grads)."""
        scale = float(self._zero.loss_scale)
        if self._zero.clip_grad > 0:
            scale *= max(1.0, (float(self._zero._global_grad_norm) + 1e-6) / self._zero.clip_grad)
        return 1.0 / scale

    def stepping(self) -> Sequence[int]:
        active = self._active_sub_group()
        return [layer for layer, place in enumerate(self._place) if place[0] == active]

    def first_of_step(self) -> bool:
        return self._active_sub_group() == 0

    def gather(self, layer: int, local: torch.Tensor) -> torch.Tensor:
        return gather_intervals(self.specs[layer], local, self._group)

    def reduce_(self, stats_LK: torch.Tensor) -> None:
        all_reduce_(stats_LK, self._group)

    def drop_gradients(self) -> None:
        flat = self._zero.fp32_partitioned_groups_flat[self._active_sub_group()]
        self._dropped = (flat, flat.grad)
        flat.grad = None

    def finish_step(self) -> None:
        # With an offloaded optimizer the gradient's memory is the engine's own buffer: it must be there again.
        if self._dropped is not None:
            flat, grad = self._dropped
            flat.grad = grad
            self._dropped = None

    def watch_gradients(self, there: Callable[[int], None]) -> list[Any]:
        raise ConfigError(
            "statistics during backward: DeepSpeed does not tell when a gradient is reduced; set training.statistics: step"
        )

    def grad_norm_before_clipping(self) -> float | None:
        return float(self._zero._global_grad_norm)

    def nonfinite_layers(self) -> list[str]:
        from deepspeed.utils import safe_get_local_grad

        local = set(
            nonfinite_names(
                (spec.name, safe_get_local_grad(self._zero.fp16_groups[place[0]][place[2]]).view(-1)[: place[3]])
                for spec, place in zip(self.specs, self._place, strict=True)
            )
        )
        flags = torch.tensor([spec.name in local for spec in self.specs], dtype=torch.int32)
        flags = flags.to(self._zero.fp32_partitioned_groups_flat[0].device)
        all_reduce_(flags, self._group)
        return [spec.name for spec, flag in zip(self.specs, flags.tolist(), strict=True) if flag]


class Zero3Engine(Engine):
    """A DeepSpeed engine at ZeRO stage 3.

    Clipping is left to the projector (``gradient_clipping`` is stated as 0: DeepSpeed's own default is 1.0).

    Raises:
        ConfigError: DeepSpeed is not installed.
    """

    skips_steps = True

    def _wrap(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        try:
            import deepspeed
        except ImportError as error:
            raise ConfigError(
                f"sharding.backend: zero3 needs DeepSpeed: pip install digrap-scale[deepspeed] ({error})"
            ) from error
        self._last = True
        self._low_precision = self.config.sharding.mixed_precision == "bfloat16"
        # The engine may cast buffers; BatchNorm's statistics are kept as they were.
        self._buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        self._dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        # It trains low-precision copies of the weights, and makes its float32 masters of those: masters and frozen
        # weights keep what the checkpoint says. It is read again where it can be, so that no rank holds it whole.
        hollow = any(parameter.is_meta for parameter in model.parameters())
        exact = {
            name: p.detach().clone() for name, p in model.named_parameters() if self._low_precision and not p.is_meta
        }
        self._frozen = {
            name: exact[name] for name, p in model.named_parameters() if name in exact and not p.requires_grad
        }
        config = self.deepspeed_config()
        if hollow:
            one_at_a_time = OneAtATime(
                model,
                self.slices,
                torch.bfloat16 if self._low_precision else None,
                self.device,
                read=dist.get_rank() == 0,
            )
            scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
            deepspeed.init_distributed(dist_init_required=False)  # else its config believes in a world of one
            deepspeed.zero.Init(module=one_at_a_time, config_dict_or_path=config)
            for buffer in model.buffers():
                buffer.data = buffer.data.to(self.device)
        else:
            scalars = self._scalars_as_vectors(model)
        self.model, *_ = deepspeed.initialize(
            model=model, optimizer=make_optimizer(model), config=config, dist_init_required=False
        )
        named = dict(self.model.module.named_parameters())
        for name in scalars:
            named[name].ds_shape = torch.Size(())
        self.optimizer = self.model.optimizer.optimizer
        if self._low_precision:
            backend = Zero3Backend(self.model)
            for spec, master in zip(backend.specs, backend.weights(), strict=True):
                if spec.name in exact:
                    master.copy_(exact[spec.name].reshape(-1)[spec.start : spec.stop])
                else:
                    assert self.slices is not None
                    fill_(master, self.slices, spec.name, spec.start)

    @staticmethod
    def _scalars_as_vectors(model: nn.Module) -> list[str]:
        """DeepSpeed sends initial weights as bytes, which a 0-d tensor (CLIP's logit_scale) cannot be viewed as: it is
        1-d until it is partitioned, and gathered in its own shape from then on. Returns their names."""
        scalars = [(name, parameter) for name, parameter in model.named_parameters() if parameter.ndim == 0]
        for _, parameter in scalars:
            parameter.data = parameter.data.view(1)
        return [name for name, _ in scalars]

    def deepspeed_config(self) -> dict[str, Any]:
        """The DeepSpeed config that this run's config amounts to."""
        config: dict[str, Any] = {
            "train_batch_size": self.config.training.global_batch_samples,
            "train_micro_batch_size_per_gpu": self.micro_batch_samples,
            "gradient_accumulation_steps": self.accumulation_steps,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 3},
            "steps_per_print": 2**31,
        }
        if self._low_precision:
            config["bf16"] = {"enabled": True}
            config["communication_data_type"] = "fp32"
        return config

    @property
    def attached_to(self) -> tuple[Any, Optimizer | None]:
        return self.model, None

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        self._last = last
        return nullcontext()

    def inference(self) -> AbstractContextManager[None]:
        return nullcontext()

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.bfloat16() if self._low_precision and tensor.is_floating_point() else tensor

    def backward(self, loss: torch.Tensor) -> None:
        self.model.backward(loss)
        if not self._last:
            self.model.step()  # takes no step before the accumulation boundary, but counts micro-batches

    def step(self) -> None:
        self.model.step()

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        first = dist.get_rank() == 0
        full: dict[str, torch.Tensor] = {}
        own_name = {id(parameter): name for name, parameter in self.model.module.named_parameters()}
        for name, parameter in self.model.module.named_parameters(remove_duplicate=False):
            own = own_name[id(parameter)]
            if parameter.requires_grad:
                value = safe_get_full_fp32_param(parameter)
            elif own in self._frozen:
                value = self._frozen[own]
            elif self._low_precision:
                if not first:
                    continue
                assert self.slices is not None
                shape = parameter.ds_shape
                value = read_whole(self.slices, own, shape, self._dtypes[name], torch.device("cpu"))
            else:
                with deepspeed.zero.GatheredParameters([parameter]):
                    value = parameter.detach().clone()
            if first:
                full[name] = value.to(self._dtypes[name]).cpu()
        for name, buffer in self.model.module.named_buffers():
            if first and name in self._dtypes:
                kept = self._buffers[name] if self._low_precision and buffer.is_floating_point() else buffer
                full[name] = kept.detach().cpu()
        return full
