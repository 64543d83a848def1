"""How long, in what portions, and what is kept."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from .base import PositiveFloat, Section


class TrainingConfig(Section):
    """How long, and in what portions."""

    steps: PositiveInt | None = Field(default=None, description="Optimizer steps; give this, `epochs` or `samples`.")
    epochs: PositiveInt | None = Field(default=None, description="Passes over the training shards.")
    samples: PositiveInt | None = Field(default=None, description="Samples to train on, whole steps of them.")
    global_batch_samples: PositiveInt = Field(description="Samples per optimizer step, over all ranks.")
    micro_batch_samples: PositiveInt | None = Field(
        default=None, description="Samples per forward on one rank; empty: no accumulation."
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Keep each layer's input alone, and compute the layer again in backward: less memory, about a third slower.",
    )
    max_grad_norm: PositiveFloat | None = Field(
        default=None, description="Clip the global gradient norm, before the projection."
    )
    max_skipped_steps: PositiveInt = Field(default=20, description="Stop after so many non-finite steps in a row.")
    kernels: Literal["auto", "eager", "compile", "native"] = Field(
        default="auto",
        description=(
            "How the method walks its layers: `native` (C++, shards on the CPU), `compile` (torch.compile), `eager`, or "
            "`auto`: native on the CPU, on accelerators compiled from 32 M elements a process on."
        ),
    )
    projection: Literal["separate", "fused"] = Field(
        default="separate",
        description=(
            "`separate`: before the optimizer's step, whatever the optimizer; `fused`: in one pass over memory with it "
            "(adamw, adam)."
        ),
    )
    statistics: Literal["step", "backward"] = Field(
        default="step",
        description=(
            "When large layers are measured: in the optimizer's `step`, or during `backward`, as soon as their gradient "
            "is there (single, fsdp2)."
        ),
    )


class CheckpointConfig(Section):
    """What is kept, and from where a run goes on."""

    every_steps: PositiveInt | None = Field(
        default=500, description="Steps between two checkpoints; empty: only when the run is asked to stop (SIGTERM)."
    )
    keep_last: PositiveInt = Field(default=2, description="Checkpoints that are kept, the newest.")
    keep_every_steps: PositiveInt | None = Field(
        default=None,
        description="Checkpoints of steps that this divides are kept for good, too; a multiple of `every_steps`.",
    )
    asynchronous: bool = Field(
        default=False,
        description="Write while training goes on, from a copy in host memory (one more copy of weights and moments).",
    )
    frozen_weights: bool = Field(
        default=True,
        description=(
            "Store weights that do not train, too. Off: smaller checkpoints of adapters, which need `model.path` as it was."
        ),
    )
    deepspeed_native: bool = Field(
        default=False,
        description="zero1/2/3: also write DeepSpeed's own `save_checkpoint` into each checkpoint, for other tools.",
    )
    resume: Annotated[str, Field(min_length=1)] = Field(
        default="auto",
        description=(
            "`auto`: go on from the newest complete checkpoint of `run.folder`, if there is one; `never`; or the folder of a "
            "checkpoint."
        ),
    )
    final: bool = Field(default=True, description="Write `final/` (safetensors, config, processor) at the end.")
