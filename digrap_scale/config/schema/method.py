"""The methods, and the reference that they look back at."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from .base import NonNegativeFloat, PositiveFloat, Regex, Section, Text, check_renames


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
