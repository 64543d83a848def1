"""The methods, and the reference that they look back at."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt

from digrap_scale.config.method_checks import BLOCK_PATTERN

from .base import Fraction, NonNegativeFloat, PositiveFloat, Regex, Section, Text, check_renames


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
    grouping: Literal["tensor", "module", "block"] = Field(
        default="tensor",
        description=(
            "What shares an ω and is projected as one vector: each tensor (the paper's layer), the tensors of a `module`, or "
            "of a `block`."
        ),
    )
    block_pattern: Regex = Field(
        default=BLOCK_PATTERN,
        description=(
            "`grouping: block`: parameters whose names have the same match are a block, others are by themselves; by default "
            "a name up to its first number (`model.layers.3`)."
        ),
    )
    fixed_strength: Fraction | None = Field(default=None, description="ω for all time; empty: it is learned.")


class DiGraPUpdateMethod(Section):
    """Our variant: projects the optimizer's update."""

    name: Literal["digrap_update"] = "digrap_update"
    strength_lr: PositiveFloat = Field(default=1e-2, description="μ, the learning rate of the strength ω.")
    fixed_strength: Fraction | None = Field(default=None, description="ω for all time; empty: it is learned.")


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


class FTPMethod(Section):
    """FTP: each row of a weight matrix stays within a learned L1 distance of its pre-trained values (a tensor of one
    dimension is one row); the first step puts weights back to the reference."""

    name: Literal["ftp"] = "ftp"
    annealing: Fraction = Field(
        default=1.0, description="κ, factor of the hyper-gradients that would shrink the distance; 0: it only grows."
    )


class LinearProbeMethod(Section):
    """Linear probing: only the head trains."""

    name: Literal["linear_probe"] = "linear_probe"
    head: list[Regex] = Field(
        default=[],
        description="Regexes of the head's parameter names; empty: those that start new (`model.new_head`).",
    )


class LPFTMethod(Section):
    """LP-FT: linear probing, then fine-tuning from there with an optimizer that starts anew; each phase goes through the
    schedule by itself. Gradients of the body are computed in both: a linear_probe run before a second run is cheaper."""

    name: Literal["lp_ft"] = "lp_ft"
    head: list[Regex] = Field(
        default=[],
        description="Regexes of the head's parameter names; empty: those that start new (`model.new_head`).",
    )
    probe_steps: PositiveInt = Field(description="Optimizer steps of the first phase, of the run's.")
    probe_learning_rate: PositiveFloat | None = Field(
        default=None, description="Peak learning rate of the first phase; empty: the optimizer's."
    )


MethodConfig = Annotated[
    NoMethod
    | DiGraPMethod
    | DiGraPUpdateMethod
    | L2SPMethod
    | PCGradMethod
    | SPDMethod
    | FTPMethod
    | LinearProbeMethod
    | LPFTMethod,
    Field(discriminator="name"),
]


REFERENCE_WORDS = ("pretrained", "initial", "zero")  # of ``reference.source``: what is no path


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
