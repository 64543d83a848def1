"""Where a run lives."""

from __future__ import annotations

from pydantic import Field

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
