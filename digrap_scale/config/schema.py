"""The whole schema of a run. Every key has a description: the README's reference is generated from here."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from .checks import CROSS_FIELD, cross_field_problems

NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy's generators take no more
Text = Annotated[str, Field(min_length=1)]


def check_regex(pattern: str) -> str:
    """``pattern`` itself, if ``re`` compiles it; ValueError with ``re``'s reason otherwise."""
    if not pattern:
        raise ValueError("an empty regex matches everything")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None
    return pattern


def check_renames(renames: dict[str, str]) -> dict[str, str]:
    """``renames`` itself, if each replacement fits its regex's groups; ValueError naming the pair otherwise."""
    for pattern, replacement in renames.items():
        try:
            # The empty alternative makes every pattern match, so that `re` parses the replacement now.
            re.compile(pattern + "|").sub(replacement, "")
        except (re.error, IndexError) as error:
            raise ValueError(
                f"expected a replacement that fits its regex {pattern!r}, found {replacement!r} ({error})"
            ) from None
    return renames


Regex = Annotated[str, AfterValidator(check_regex)]


class Section(BaseModel):
    """A section of the config: unknown keys are errors, values are not coerced between kinds."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )


class RunConfig(Section):
    """Where the run lives and what makes it reproducible."""

    folder: Text = Field(description="Folder of the run; holds `config.yaml`, `metrics.jsonl`, `final/`, …")
    seed: Seed = Field(default=0, description="Seed of weights, shuffling and dropout.")
    overwrite: bool = Field(default=False, description="Replace the folder of an earlier, finished or broken, run.")


class LoraConfig(Section):
    """Low-rank adapters through PEFT; their reference is zero."""

    rank: PositiveInt = Field(default=8, description="Rank of the update.")
    alpha: PositiveFloat = Field(default=16.0, description="Scale of the update (`lora_alpha`).")
    dropout: BelowOne = Field(default=0.0, description="Dropout on the adapter's input.")
    target_modules: Regex | Annotated[list[Text], Field(min_length=1)] = Field(
        description="Regex, or list of name endings, of the modules to adapt."
    )
    modules_to_save: list[Text] = Field(
        default=[], description="Modules trained in full and saved with the adapter (a new head)."
    )


class ModelConfig(Section):
    """The model, through transformers."""

    path: Text = Field(description="Folder in Hugging Face layout, or a hub id.")
    task: Literal["classification", "contrastive"] = Field(description="What the model is trained for.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Dtype of the weights that are trained."
    )
    freeze: list[Regex] = Field(
        default=[], description="Regexes of parameter names that do not train; each must match one."
    )
    train_only: list[Regex] = Field(default=[], description="Regexes: everything that none of them matches is frozen.")
    batch_norm: Literal["frozen", "train"] = Field(
        default="frozen",
        description=(
            "`frozen`: BatchNorm uses its pre-trained statistics; `train`: they follow the data (one process only)."
        ),
    )
    lora: LoraConfig | None = Field(default=None, description="Adapters instead of full fine-tuning.")
    new_head: bool = Field(
        default=False,
        description="Allow a head whose size differs from the checkpoint's: it starts new and is not projected.",
    )
    trust_remote_code: bool = Field(default=False, description="Let transformers run code from the model's repository.")


class DataConfig(Section):
    """webdataset shards of an image and a JSON a sample."""

    train: list[Text] = Field(
        min_length=1, description="Shard files or patterns (`{000..009}`, `*`), relative to the working directory."
    )
    classes: Text | None = Field(
        default=None, description="JSON file: class name → prompt (contrastive) or a list of class names."
    )
    target: Literal["label", "caption"] = Field(
        default="label",
        description=(
            "`label`: tell classes apart; `caption`: tell the batch's own captions apart (contrastive pre-training)."
        ),
    )
    label_field: Text = Field(default="label", description="Key of the class name in a sample's JSON.")
    caption_field: Text = Field(default="caption", description="Key of the caption in a sample's JSON.")
    workers: NonNegativeInt = Field(default=0, description="Loader processes a rank.")
    shuffle_buffer_samples: NonNegativeInt = Field(
        default=1000, description="Samples that a worker shuffles among; 0 keeps the order."
    )
    augment: Literal["none", "crop"] = Field(default="none", description="`crop`: random resized crop (no flip).")


class NoMethod(Section):
    """Plain fine-tuning."""

    name: Literal["none"] = "none"


class DiGraPMethod(Section):
    """DiGraP, the paper's form: projects the gradient."""

    name: Literal["digrap"] = "digrap"
    strength_lr: PositiveFloat = Field(default=1e-2, description="μ, the learning rate of the strength ω.")
    normalization: Literal["layers", "cosine", "none"] = Field(
        default="layers", description="How the hyper-gradient is normalised."
    )
    hypergradient: Literal["all", "conflicts"] = Field(default="all", description="Layers whose hyper-gradient counts.")


class DiGraPUpdateMethod(Section):
    """Our variant: projects the optimizer's update."""

    name: Literal["digrap_update"] = "digrap_update"
    strength_lr: PositiveFloat = Field(default=1e-2, description="μ, the learning rate of the strength ω.")


class L2SPMethod(Section):
    """L2-SP: adds λ(θ − θ₀) to the gradient."""

    name: Literal["l2sp"] = "l2sp"
    weight: NonNegativeFloat = Field(description="λ.")


class PCGradMethod(Section):
    """PCGrad: DiGraP with ω = 1."""

    name: Literal["pcgrad"] = "pcgrad"


class SPDMethod(Section):
    """SPD: selective projection decay."""

    name: Literal["spd"] = "spd"
    weight: NonNegativeFloat = Field(description="λ.")


MethodConfig = Annotated[
    NoMethod | DiGraPMethod | DiGraPUpdateMethod | L2SPMethod | PCGradMethod | SPDMethod, Field(discriminator="name")
]


class ReferenceConfig(Section):
    """The pre-trained weights θ₀ that the method looks back at."""

    source: Text = Field(
        default="pretrained",
        description=(
            "`pretrained` (the safetensors of `model.path`), `initial` (a copy of the weights at the start), "
            "`zero`, or a safetensors file, index or folder."
        ),
    )
    placement: Literal["device", "cpu", "stream"] = Field(
        default="device",
        description=(
            "Where a rank's slices are kept: `device` (beside the weights), `cpu`, or `stream`: nowhere, they are read "
            "from their file in each step."
        ),
    )
    buffer_bytes: Annotated[int, Field(ge=1 << 20)] = Field(
        default=256 << 20, description="Host memory that a streamed reference is read through, per process."
    )
    previous: Literal["auto", "stored", "recomputed"] = Field(
        default="auto",
        description=(
            "The weights before the last step, for the hyper-gradient: `stored` (one more shard), `recomputed` (from "
            "the moments of adamw or adam: no memory), or `auto`: recomputed where it can be."
        ),
    )
    rename: Annotated[dict[Regex, str], AfterValidator(check_renames)] = Field(
        default={}, description="Regex → replacement, from the model's parameter names to the file's."
    )


class ParameterGroupConfig(Section):
    """Parameters with settings of their own; the first group that matches counts."""

    pattern: Regex = Field(description="Regex of parameter names; must match one.")
    learning_rate: NonNegativeFloat | None = Field(default=None, description="In place of the optimizer's.")
    weight_decay: NonNegativeFloat | None = Field(default=None, description="In place of the optimizer's.")


class OptimizerConfig(Section):
    """The base optimizer."""

    name: Literal["adamw", "adam", "sgd"] = Field(default="adamw", description="torch's optimizer of that name.")
    learning_rate: PositiveFloat = Field(description="Peak learning rate.")
    weight_decay: NonNegativeFloat = Field(default=0.0, description="Decoupled for adamw.")
    betas: tuple[BelowOne, BelowOne] = Field(default=(0.9, 0.999), strict=False, description="Adam's β₁ and β₂.")
    eps: PositiveFloat = Field(default=1e-8, description="Adam's ε.")
    momentum: BelowOne = Field(default=0.0, description="SGD's momentum.")
    groups: list[ParameterGroupConfig] = Field(default=[], description="Parameter groups.")


class ScheduleConfig(Section):
    """The learning rate over time."""

    name: Literal["constant", "linear", "cosine"] = Field(default="cosine", description="Shape after the warm-up.")
    warmup_steps: NonNegativeInt = Field(default=0, description="Steps from 0 to the peak.")
    final_learning_rate_ratio: Fraction = Field(default=0.0, description="Last learning rate ÷ peak.")


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
    reduce_timeout_s: PositiveInt = Field(default=1800, description="Time-out of a collective, in seconds.")


class TrainingConfig(Section):
    """How long, and in what portions."""

    steps: PositiveInt | None = Field(default=None, description="Optimizer steps; give this or `epochs`.")
    epochs: PositiveInt | None = Field(default=None, description="Passes over the training shards.")
    global_batch_samples: PositiveInt = Field(description="Samples per optimizer step, over all ranks.")
    micro_batch_samples: PositiveInt | None = Field(
        default=None, description="Samples per forward on one rank; empty: no accumulation."
    )
    max_grad_norm: PositiveFloat | None = Field(
        default=None, description="Clip the global gradient norm, before the projection."
    )
    max_skipped_steps: PositiveInt = Field(default=20, description="Stop after so many non-finite steps in a row.")
    kernels: Literal["auto", "eager", "compile"] = Field(
        default="auto",
        description="How the method walks large layers; `auto`: compiled from 32 M elements a process on.",
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
    """What is kept."""

    final: bool = Field(default=True, description="Write `final/` (safetensors, config, processor) at the end.")


class SuiteEntry(Section):
    """One test set."""

    name: Text = Field(description="Name in the table.")
    shards: list[Text] = Field(min_length=1, description="Shard files or patterns.")
    shift: Literal["id", "near", "far"] = Field(description="How far it is from the training data.")


class EvaluationConfig(Section):
    """ID/OOD test sets."""

    suite: list[SuiteEntry] = Field(default=[], description="Test sets, in the table's order.")
    batch_samples: PositiveInt = Field(default=64, description="Samples per forward on one rank.")
    at_end: bool = Field(default=True, description="Evaluate after training.")


class LoggingConfig(Section):
    """What is shown and written."""

    every_steps: PositiveInt = Field(default=10, description="Steps between two lines of `metrics.jsonl`.")
    strength_every_steps: PositiveInt = Field(default=10, description="Steps between two snapshots of ω per layer.")
    tensorboard: bool = Field(default=True, description="Write `tensorboard/`.")


class Config(Section):
    """One run."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    method: MethodConfig
    reference: ReferenceConfig = ReferenceConfig()
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    sharding: ShardingConfig = ShardingConfig()
    training: TrainingConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _cross_field(self) -> Config:
        problems = cross_field_problems(self.model_dump())
        if problems:
            lines = "; ".join(f"{'.'.join(map(str, path))}: {message}" for path, message in problems)
            raise PydanticCustomError(CROSS_FIELD, "{problems}", {"problems": lines})
        return self
