"""What a comparison's YAML says. Every key has a description; unknown keys are errors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from digrap_scale.config.schema.base import Fraction, Section, Seed, Text

Values = dict[str, Any]  # dotted key of a run's config, or section → its value
Choices = Annotated[list[Any], Field(min_length=1)]


class MethodEntry(Section):
    """One method."""

    method: Values = Field(description="The section `method` of its runs.")
    overrides: Values = Field(
        default={}, description="Other keys of its runs (`model.lora: …`); no data, no test sets."
    )
    search: dict[str, Choices] = Field(
        default={}, description="Its own hyper-parameters: dotted key → the values that are tried."
    )


class WiseFTEntry(Section):
    """WiSE-FT rows: the weights of a method's runs, interpolated with the pre-trained ones; no training of their own."""

    of: Text = Field(description="The method whose runs are interpolated.")
    alphas: list[Fraction] = Field(
        min_length=1, description="The α that are measured; the best on ID validation is the row, all are the curve."
    )


class ExecutorConfig(Section):
    """Where trials run."""

    name: Literal["local", "submitit"] = Field(
        default="local", description="`local`: processes of this machine; `submitit`: jobs of a cluster."
    )
    trials: PositiveInt = Field(default=1, description="Trials at a time.")
    ranks: PositiveInt = Field(default=1, description="Processes of a trial, started by torchrun.")
    cluster: Literal["slurm", "local"] = Field(
        default="slurm", description="submitit: its executor; `local` runs the jobs on this machine."
    )
    timeout_minutes: PositiveInt = Field(default=24 * 60, description="submitit: longest time of a job.")
    parameters: dict[str, int | float | str | bool] = Field(
        default={}, description="submitit: further parameters of its executor (`slurm_partition`, `gpus_per_node`, …)."
    )


class GridConfig(Section):
    """A comparison."""

    out: Text = Field(description="Folder of trials, tables, pictures and the report.")
    base: Text | Values = Field(
        description="Run config that all trials start from: a YAML file's path, or its content."
    )
    seeds: list[Seed] = Field(min_length=1, description="`run.seed` of the runs in the table.")
    search_seeds: PositiveInt = Field(default=1, description="So many of `seeds`, the first ones, are used to search.")
    domains: dict[str, Values] = Field(
        default={},
        description="Source domain → what differs in its runs (`data.train`, `evaluation.suite`); empty: one.",
    )
    methods: dict[str, MethodEntry] = Field(min_length=1, description="Name in the table → method.")
    baseline: Text = Field(default="FT", description="The method that the others are subtracted from.")
    shared_search: dict[str, Choices] = Field(
        default={}, description="Hyper-parameters that all methods search alike, such as `optimizer.learning_rate`."
    )
    budget: PositiveInt = Field(
        description="Most settings that are tried of a method in a domain; of a larger grid as many are drawn."
    )
    wise_ft: WiseFTEntry | None = Field(default=None, description="WiSE-FT rows; empty: none.")
    zero_shot: bool = Field(default=True, description="Measure the pre-trained weights, too.")
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = Field(
        default=0.95, description="Of the intervals of paired differences."
    )
    bootstrap_samples: Annotated[int, Field(ge=100)] = Field(default=10_000, description="Resamples of an interval.")
    executor: ExecutorConfig = ExecutorConfig()
