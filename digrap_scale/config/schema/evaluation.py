"""Test sets."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from .base import Fraction, Section, Text


class SuiteEntry(Section):
    """One test set."""

    name: Text = Field(description="Name in the table.")
    shards: list[Text] = Field(min_length=1, description="Shard files or patterns.")
    shift: Literal["id", "near", "far"] = Field(description="How far it is from the training data.")
    modality: Literal["none", "vision", "question", "answer", "multimodal", "adversarial", "other"] = Field(
        default="none", description="What has shifted; shown in the tables."
    )


class ShiftDegreeConfig(Section):
    """How far each test set is from the training set: Mahalanobis distance of the model's own embeddings (docs/evaluation.md)."""

    train_samples: PositiveInt | None = Field(
        default=None,
        description=(
            "Take mean and covariance from so many training samples at least: whole shards, drawn by the run's seed. "
            "Empty: from all."
        ),
    )


class GenerationConfig(Section):
    """How answers are generated: greedily, or by beam search; never sampled."""

    max_new_tokens: PositiveInt = Field(default=16, description="Longest answer, in tokens.")
    num_beams: PositiveInt = Field(default=1, description="Beams; 1 is greedy.")


class EvaluationConfig(Section):
    """ID/OOD test sets."""

    suite: list[SuiteEntry] = Field(default=[], description="Test sets, in the table's order.")
    suite_file: Text | None = Field(
        default=None,
        description="YAML file with a key `suite`: more test sets, after those of `suite` (`configs/suites/`).",
    )
    shift_degree: ShiftDegreeConfig | None = Field(
        default=None, description="Measure the degree of shift, too (`{}` for its defaults); empty: do not."
    )
    generation: GenerationConfig | None = Field(
        default=None, description="vqa: how answers are generated; empty: its defaults."
    )
    class_answers: Literal["generate", "likelihood"] = Field(
        default="generate",
        description=(
            "classification-as-vqa: right is a generated answer that reads as the class's name, or the name of the highest "
            "`likelihood` (a forward a class)."
        ),
    )
    batch_samples: PositiveInt = Field(default=64, description="Samples per forward on one rank.")
    interpolate_alphas: list[Fraction] = Field(
        default=[],
        description=(
            "WiSE-FT: after training, evaluate (1 − α)·θ₀ + α·θ for each of these α, too (0: pre-trained, 1: the run's); "
            "θ₀ are the weights of `model.path`, or those of the file that `reference.source` names."
        ),
    )
    at_end: bool = Field(default=True, description="Evaluate after training.")
