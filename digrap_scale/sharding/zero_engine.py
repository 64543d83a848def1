"""DeepSpeed engines at ZeRO stages 1, 2 and 3, made from a run's config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from digrap_scale.errors import ConfigError, NonFiniteError
from digrap_scale.sharding.base import Backend, unwrapped_name
from digrap_scale.sharding.ddp import DDPBackend
from digrap_scale.sharding.deepspeed_json import merged, zero_sizes
from digrap_scale.sharding.engine import Engine, MakeOptimizer
from digrap_scale.sharding.materialize import OneAtATime, fill_, materialize, read_whole
from digrap_scale.sharding.zero import check_engine
from digrap_scale.sharding.zero3 import Zero3Backend
from digrap_scale.sharding.zero12 import Bf16Backend, Zero12Backend

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def zero_backend(engine: Any) -> Backend:
    """The backend of a DeepSpeed engine.

    Raises:
        ConfigError: an engine that no backend can see through; the message says what to change.
    """
    check_engine(engine)
    stage = engine.zero_optimization_stage()
    if stage == 0:  # float32, every rank the whole: what DDP is
        return DDPBackend(engine.module, engine.optimizer)
    if stage == 3:
        return Zero3Backend(engine)
    return Bf16Backend(engine) if type(engine.optimizer).__name__ == "BF16_Optimizer" else Zero12Backend(engine)


class ZeroEngine(Engine):
    """A DeepSpeed engine at the ZeRO stage that ``sharding.backend`` names.

    Clipping is left to the projector (``gradient_clipping`` is stated as 0: DeepSpeed's own default is 1.0).

    Raises:
        ConfigError: DeepSpeed is not installed, or the device does not compute in the wanted precision.
    """

    skips_steps = True

    @property
    def lockstep(self) -> bool:  # type: ignore[override]
        return self._stage == 3

    def _wrap(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        sharding = self.config.sharding
        try:
            import deepspeed
        except ImportError as error:
            raise ConfigError(
                f"sharding.backend: {sharding.backend} needs DeepSpeed: pip install digrap-scale[deepspeed] ({error})"
            ) from error
        self._last = True
        self._stage = int(sharding.backend.removeprefix("zero"))
        self._dtype = _DTYPES.get(sharding.mixed_precision)
        if self._dtype == torch.float16 and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
            raise ConfigError(
                "sharding.mixed_precision: DeepSpeed says that this device does not compute in float16; use bfloat16"
            )
        # The engine may cast buffers; BatchNorm's statistics are kept as they were.
        self._buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        self._dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        # It trains half-precision copies of the weights, and makes its float32 masters of those: masters and frozen
        # weights keep what the checkpoint says. It is read again where it can be, so that no rank holds it whole.
        hollow = any(parameter.is_meta for parameter in model.parameters())
        exact = {
            name: p.detach().clone()
            for name, p in model.named_parameters()
            if self._dtype is not None and not p.is_meta
        }
        self._frozen = {
            name: exact[name] for name, p in model.named_parameters() if name in exact and not p.requires_grad
        }
        scalars = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 0}
        if hollow and self._stage == 3:
            self._partition(model)
        else:
            materialize(model, self.slices, self.device)
            scalars = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 0}
            # DeepSpeed sends initial weights as bytes, which a 0-d tensor (CLIP's logit_scale) cannot be viewed as: it is
            # 1-d until they are sent; stage 3 partitions it so, and gathers it in its own shape from then on.
            for parameter in scalars.values():
                parameter.data = parameter.data.view(1)

        def optimizer_of(_: object) -> Optimizer:
            """Called when the weights have been sent, before stages 1 and 2 put them into buffers."""
            for parameter in scalars.values() if self._stage < 3 else ():
                parameter.data = parameter.data.view(())
            return make_optimizer(model)

        self.model, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer_of, config=self.deepspeed_config(), dist_init_required=False
        )
        # DeepSpeed before 0.19.2 rounds all buffers: a rotary embedding's frequencies, too.
        for name, buffer in self.model.module.named_buffers():
            if buffer.dtype != self._buffers[name].dtype:
                buffer.data = self._buffers[name].to(buffer.device)
        named = dict(self.model.module.named_parameters())
        for name in scalars if self._stage == 3 else ():
            named[name].ds_shape = torch.Size(())
        self.optimizer = self.model.optimizer.optimizer
        self._backend = zero_backend(self.model)
        if self._dtype is not None:
            for spec, master in zip(self._backend.specs, self._backend.weights(), strict=True):
                if spec.name in exact:
                    master.copy_(exact[spec.name].reshape(-1)[spec.start : spec.stop])
                else:
                    assert self.slices is not None
                    fill_(master, self.slices, spec.name, spec.start)

    def _partition(self, model: nn.Module) -> None:
        """Stage 3: parameters on the meta device become this rank's partitions, one after the other."""
        import deepspeed

        one_at_a_time = OneAtATime(model, self.slices, self._dtype, self.device, read=dist.get_rank() == 0)
        deepspeed.init_distributed(dist_init_required=False)  # else its config believes in a world of one
        deepspeed.zero.Init(module=one_at_a_time, config_dict_or_path=self.deepspeed_config())
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.device)

    def deepspeed_config(self) -> dict[str, Any]:
        """The DeepSpeed config that this run's config amounts to, with what the user's own file adds."""
        sharding = self.config.sharding
        sizes = zero_sizes(self.config)
        zero: dict[str, Any] = {"stage": self._stage, "reduce_bucket_size": sizes.reduce_bucket_elements}
        if self._stage == 3:
            zero["sub_group_size"] = sizes.sub_group_elements
            zero["stage3_param_persistence_threshold"] = sizes.persistence_threshold_elements
        config: dict[str, Any] = {
            "train_batch_size": self.config.training.global_batch_samples,
            "train_micro_batch_size_per_gpu": self.micro_batch_samples,
            "gradient_accumulation_steps": self.accumulation_steps,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": zero,
            "steps_per_print": 2**31,
        }
        if sharding.offload == "cpu":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.device.type != "cpu"}
            # torch's own optimizer steps on the CPU, with its fused kernel.
            config["zero_force_ds_cpu_optimizer"] = False
        if self._dtype is not None:
            config["bf16" if self._dtype == torch.bfloat16 else "fp16"] = {"enabled": True}
            # Gradients are summed over ranks in float32: half precision's sums lose what many ranks add.
            config["communication_data_type"] = "fp32"
        return merged(self.config, config)

    @property
    def attached_to(self) -> tuple[Any, Optimizer | None]:
        return self.model, None

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        self._last = last
        # Not by DeepSpeed's own count, which takes a step to be `accumulation_steps` backwards: budgets may ask for more.
        self.model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def inference(self) -> AbstractContextManager[None]:
        return nullcontext()

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._dtype) if self._dtype is not None and tensor.is_floating_point() else tensor

    def backward(self, loss: torch.Tensor) -> None:
        self.model.backward(loss)
        if not self._last:
            self.model.step()  # takes no step before the accumulation boundary, but counts micro-batches

    def step(self) -> None:
        try:
            self.model.step()
        except Exception as error:
            # DeepSpeed's loss scaler raises a plain Exception, on all ranks.
            if "loss scale already at minimum" not in str(error):
                raise
            stopped = NonFiniteError(
                "sharding.mixed_precision: float16: gradients overflow at the smallest loss scale, too; use bfloat16, or "
                "lower optimizer.learning_rate"
            )
            stopped.agreed = True
            raise stopped from error

    def dtypes(self) -> dict[str, torch.dtype]:
        return {unwrapped_name(name): dtype for name, dtype in self._dtypes.items()}

    def saved_buffers(self) -> dict[str, torch.Tensor]:
        found = super().saved_buffers()
        if self._dtype is not None:  # the model's may be rounded
            found = {name: self._buffers[name] if b.is_floating_point() else b for name, b in found.items()}
        return found

    def frozen_values(self, name: str, start: int, stop: int, live: torch.Tensor) -> torch.Tensor:
        if self._dtype is None:
            return live
        if name in self._frozen:
            return self._frozen[name].reshape(-1)[start:stop]
        assert self.slices is not None
        return self.slices(name, start, stop).to(self._dtypes[name])

    def extra_state(self) -> dict[str, Any]:
        if self._dtype != torch.float16:
            return {}
        scaler = vars(self.model.optimizer.loss_scaler)
        plain = {key: value for key, value in scaler.items() if isinstance(value, (bool, int, float))}
        return {"loss_scaler": plain, "skipped_steps": int(self.model.skipped_steps)}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        if self._dtype == torch.float16:
            scaler = self.model.optimizer.loss_scaler
            for key, value in state.get("loss_scaler", {}).items():
                if isinstance(vars(scaler).get(key), (int, float)):  # a scale begins as int, and is float once halved
                    setattr(scaler, key, value)
            self.model.skipped_steps = int(state.get("skipped_steps", 0))

    def native_writer(self) -> Callable[[Path], None] | None:
        # No `latest` file: which checkpoint counts is told by ours.
        return lambda folder: self.model.save_checkpoint(str(folder), tag="engine", save_latest=False)

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        import deepspeed

        first = dist.get_rank() == 0
        names = {id(p): unwrapped_name(name) for name, p in self.model.module.named_parameters()}
        masters = self._backend.weights()
        layers = {spec.name: layer for layer, spec in enumerate(self._backend.specs)}
        full: dict[str, torch.Tensor] = {}
        for name, parameter in self.model.module.named_parameters(remove_duplicate=False):
            own = names[id(parameter)]
            layer = layers.get(own)
            if layer is not None:
                value = self._backend.gather(layer, masters[layer])
            elif own in self._frozen:
                value = self._frozen[own]
            elif self._dtype is not None:
                if not first:
                    continue
                assert self.slices is not None
                shape = getattr(parameter, "ds_shape", parameter.shape)
                value = read_whole(self.slices, own, shape, self._dtypes[name], torch.device("cpu"))
            elif self._stage == 3:
                with deepspeed.zero.GatheredParameters([parameter]):
                    value = parameter.detach().clone()
            else:
                value = parameter.detach()
            if first:
                full[name] = value.to(self._dtypes[name]).cpu()
        for name, buffer in self.model.module.named_buffers():
            if first and name in self._dtypes:
                kept = self._buffers[name] if self._dtype is not None and buffer.is_floating_point() else buffer
                full[name] = kept.detach().cpu()
        return full
