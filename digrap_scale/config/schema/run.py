"""Where a run lives, and what it shows."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from .base import Section, Seed, Text


class RunConfig(Section):
    """Where the run lives and what makes it reproducible."""

    folder: Text = Field(description="Folder of the run; holds `config.yaml`, `metrics.jsonl`, `final/`, …")
    seed: Seed = Field(default=0, description="Seed of weights, shuffling and dropout.")
    deterministic: bool = Field(
        default=False,
        description=(
            "Only operators of torch that give the same bits every time (an error where there is none); slower on accelerators."
        ),
    )
    overwrite: bool = Field(default=False, description="Replace the folder of an earlier, finished or broken, run.")


class LoggingConfig(Section):
    """What is shown and written."""

    every_steps: PositiveInt = Field(default=10, description="Steps between two lines of `metrics.jsonl`.")
    strength_every_steps: PositiveInt = Field(default=10, description="Steps between two snapshots of ω per layer.")
    layers_every_steps: PositiveInt | None = Field(
        default=None,
        description=(
            "Steps between two lines of `layers.jsonl`: each layer's conflict rate and drift from the reference (which is then "
            "held also by methods that do not need it); empty: not written."
        ),
    )
    tensorboard: bool = Field(default=True, description="Write `tensorboard/`.")
