"""What a run shows and writes, and who else is told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from .base import Section, Text


class WandbConfig(Section):
    """Weights & Biases: a run of a project gets the metrics and the config (`pip install 'digrap-scale[wandb]'`)."""

    project: Text = Field(description="Project.")
    entity: Text | None = Field(default=None, description="User or team; empty: the account's default.")
    name: Text | None = Field(default=None, description="Name of the run; empty: that of `run.folder`.")
    mode: Literal["online", "offline"] = Field(
        default="online", description="`offline`: files in `wandb/` of the run's folder, for `wandb sync`."
    )


class MlflowConfig(Section):
    """MLflow: a run of an experiment gets the metrics and the config (`pip install 'digrap-scale[mlflow]'`)."""

    tracking_uri: Text = Field(description="The server (`http://host:5000`), or a database (`sqlite:///runs.db`).")
    experiment: Text = Field(default="digrap-scale", description="Experiment; made if it is not there.")
    name: Text | None = Field(default=None, description="Name of the run; empty: that of `run.folder`.")


class ProfilerConfig(Section):
    """A window of torch's profiler; writes `profile/` (Chrome traces, for Perfetto or `chrome://tracing`)."""

    skip_steps: NonNegativeInt = Field(default=5, description="Steps of this process before the window.")
    warmup_steps: PositiveInt = Field(default=1, description="Steps that are profiled, and thrown away.")
    steps: PositiveInt = Field(default=3, description="Steps in the trace.")
    every_rank: bool = Field(default=False, description="A trace of each rank; otherwise of rank 0 only.")
    memory: bool = Field(default=False, description="Allocations, too.")


class LoggingConfig(Section):
    """What is shown and written."""

    every_steps: PositiveInt = Field(default=10, description="Steps between two lines of `metrics.jsonl`.")
    strength_every_steps: PositiveInt = Field(default=10, description="Steps between two snapshots of ω per layer.")
    layers_every_steps: PositiveInt | None = Field(
        default=None,
        description=(
            "Steps between two lines of `layers.jsonl`, and histograms in TensorBoard: each layer's conflict rate and drift from "
            "the reference (which is then held also by methods that do not need it); empty: not written."
        ),
    )
    tensorboard: bool = Field(default=True, description="Write `tensorboard/`.")
    wandb: WandbConfig | None = Field(default=None, description="Also tell Weights & Biases.")
    mlflow: MlflowConfig | None = Field(default=None, description="Also tell an MLflow server.")
    profiler: ProfilerConfig | None = Field(default=None, description="Profile some steps (`{}`: the defaults).")
