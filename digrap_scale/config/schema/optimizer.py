"""The base optimizer and its schedule."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import BelowOne, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, Regex, Section


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
