"""How state is spread over ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from .base import NonNegativeInt, Section, Text


class ZeroConfig(Section):
    """Sizes that DeepSpeed works with; the defaults are its own."""

    sub_group_elements: PositiveInt = Field(
        default=1_000_000_000, description="zero3: elements that one optimizer step takes at most (`sub_group_size`)."
    )
    persistence_threshold_elements: NonNegativeInt = Field(
        default=100_000,
        description="zero3: smaller parameters stay whole between steps (`stage3_param_persistence_threshold`).",
    )
    reduce_bucket_elements: PositiveInt = Field(
        default=500_000_000, description="Gradients that are reduced at once; a buffer of that size is held."
    )


class ShardingConfig(Section):
    """How weights, gradients and optimizer state are spread over ranks."""

    backend: Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = Field(
        default="single", description="Sharding backend."
    )
    wrap: list[Text] = Field(
        default=[], description="Class names of the blocks that FSDP2 shards one by one; empty: the model's own list."
    )
    reshard_after_forward: bool = Field(
        default=True, description="FSDP2: free a block's full weights after its forward."
    )
    replicas: PositiveInt = Field(
        default=1,
        description=(
            "FSDP2: copies of the sharded model (HSDP); the number of processes must be a multiple, and neighbouring ranks "
            "share one copy."
        ),
    )
    mixed_precision: Literal["none", "bfloat16", "float16"] = Field(
        default="none",
        description=(
            "Dtype of compute; the weights that are stepped keep `model.dtype`. `float16` with a dynamic loss scale "
            "(zero1/2/3)."
        ),
    )
    offload: Literal["none", "cpu"] = Field(
        default="none",
        description="Where masters and optimizer state live: `cpu` keeps them in host memory (fsdp2, zero1/2/3).",
    )
    zero: ZeroConfig | None = Field(default=None, description="DeepSpeed's sizes (zero1/2/3 only).")
    deepspeed_config: Text | None = Field(
        default=None,
        description=(
            "zero1/2/3: a DeepSpeed JSON whose settings are used, too; what contradicts this config is an error "
            "(docs/plan.md)."
        ),
    )
    reduce_timeout_s: PositiveInt = Field(default=1800, description="Time-out of a collective, in seconds.")
