"""The real ``Trainer`` (and TRL's) on real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from digrap_scale.integrations.hf_trainer import DigrapCallback
from tests.integrations.vlm_data import (
    EPS,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    METHOD,
    STEPS,
    load_pretrained,
    result,
    samples,
    stacked,
)

ZERO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "steps_per_print": 2**31,
}


def allow_sharding_on_cpu() -> None:
    """Accelerate turns FSDP and DeepSpeed on for accelerators only; its code runs on CPUs once it is told so."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, deepspeed_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, deepspeed_plugin=deepspeed_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        elif deepspeed_plugin is not None:
            self.distributed_type, self.deepspeed_plugins = DistributedType.DEEPSPEED, deepspeed_plugin
            deepspeed_plugin.set_mixed_precision("no")
            deepspeed_plugin.select(_from_accelerator_state=True)
        PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = init  # type: ignore[method-assign]


def arguments(output: Path, backend: str, ranks: int, **more: Any) -> dict[str, Any]:
    """What TrainingArguments and its subclasses are given."""
    of_backend: dict[str, Any] = {}
    if backend != "ddp":
        allow_sharding_on_cpu()
    if backend == "fsdp2":
        of_backend = {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "CLIPEncoderLayer"],
                "reshard_after_forward": True,
            },
        }
    elif backend.startswith("zero"):
        of_backend = {"deepspeed": {**ZERO, "zero_optimization": {"stage": int(backend[-1])}}}
    return {
        "output_dir": str(output),
        "use_cpu": True,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4 // ranks,
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "adam_epsilon": EPS,
        "weight_decay": 0.0,
        "max_grad_norm": MAX_GRAD_NORM,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "train_sampling_strategy": "sequential",
        "save_steps": STEPS // 2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        **of_backend,
        **more,
    }


def train(
    folder: str, output: str, backend: str, ranks: int, resume: bool, reload: bool = True, **method: Any
) -> dict[str, Any]:
    unset_hf_deepspeed_config()  # else a model built after an earlier run's arguments is built under that run's zero.Init
    middle = str(Path(output) / f"checkpoint-{STEPS // 2}")
    trainer = Trainer(
        # Names of a LLaVA's file are mapped on loading, which a resuming Trainer leaves out (sharded ones read their own).
        load_pretrained(middle if resume and backend == "ddp" and reload else folder),
        TrainingArguments(**arguments(Path(output), backend, ranks)),
        train_dataset=samples(),
        data_collator=stacked,
    )
    callback = DigrapCallback(reference=folder, **{**METHOD, **method}).add_to(trainer)
    found: dict[str, Any] = {}

    def keep(*_: Any, **__: Any) -> None:
        assert callback.projector is not None
        found.update(result(callback.projector))

    original = callback.on_train_end
    callback.on_train_end = lambda *args, **kwargs: (keep(), original(*args, **kwargs))[1]  # type: ignore[method-assign]
    trainer.train(resume_from_checkpoint=middle if resume else None)
    return {**found, "history": trainer.state.log_history}


def train_and_resume(folder: str, output: str, backend: str, ranks: int, **method: Any) -> dict[str, Any]:
    """A whole run, and one that goes on from the middle of it."""
    whole = train(folder, output, backend, ranks, False, **method)
    torch.manual_seed(99)  # what a new process would not know
    return {"whole": whole, "resumed": train(folder, output, backend, ranks, True, **method)}
