"""Scores of generated answers, summed by test set and group, so that ranks can add them up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from digrap_scale.errors import ConfigError
from digrap_scale.evaluation.metrics import IGNORED_LABEL
from digrap_scale.evaluation.vqa_accuracy import vqa_accuracy
from digrap_scale.types import Batch

# (model inputs, transformers' GenerationConfig) → ids of prompt and new tokens.
Generate = Callable[[dict[str, torch.Tensor], Any], torch.Tensor]
Gather = Callable[[Any], list[Any]]
Sums = dict[tuple[str, str], tuple[float, float, int]]


class GeneratingTask(Protocol):
    """What the suite needs of a task whose answers are texts."""

    def predict(self, generate: Generate, batch: Batch) -> list[str]:
        """A text for each sample of the batch, padding included."""
        ...


@dataclass
class ScoreSums:
    """(test set, group) → sum of scores, sum of their squares (both float64), samples."""

    sums: Sums = field(default_factory=dict)

    def add(self, name: str, group: str, score: float) -> None:
        """One sample's score in [0, 1]."""
        total, squares, samples = self.sums.get((name, group), (0.0, 0.0, 0))
        self.sums[name, group] = (total + score, squares + score * score, samples + 1)

    @classmethod
    def merged(cls, parts: Iterable[Mapping[tuple[str, str], tuple[float, float, int]]]) -> ScoreSums:
        """The sums of all ranks, added up in rank order: the same numbers on every rank."""
        merged: Sums = {}
        for part in parts:
            for key, (total, squares, samples) in part.items():
                before = merged.get(key, (0.0, 0.0, 0))
                merged[key] = (before[0] + total, before[1] + squares, before[2] + samples)
        return cls(merged)

    def of(self, name: str, group: str | None = None) -> tuple[float, float, int]:
        """Mean, its standard error and samples of a set, or of one of its groups; NaN without samples."""
        chosen = [s for (one, other), s in self.sums.items() if one == name and group in (None, other)]
        samples = sum(part[2] for part in chosen)
        if not samples:
            return math.nan, math.nan, 0
        mean = math.fsum(part[0] for part in chosen) / samples
        variance = max(math.fsum(part[1] for part in chosen) / samples - mean * mean, 0.0)
        return mean, math.sqrt(variance / samples), samples

    def groups(self, name: str) -> dict[str, float]:
        """Group → mean, by name; samples without a group are left out."""
        names = sorted(group for one, group in self.sums if one == name and group)
        return {group: self.of(name, group)[0] for group in names}


def score_batch(task: GeneratingTask, generate: Generate, batch: Batch, name: str, sums: ScoreSums) -> None:
    """Generates a batch's answers and adds the scores of its real samples (label other than −1) to ``sums``.

    Raises:
        ConfigError: the batch has no answers to compare with.
    """
    texts = task.predict(generate, batch)
    if batch.labels is None or (len(batch.answers) != len(texts) and bool((batch.labels != IGNORED_LABEL).any())):
        raise ConfigError(f"test set {name} has no answers; see data.answers_field")
    for row, label in enumerate(batch.labels.tolist()):
        if label != IGNORED_LABEL:
            group = batch.groups[row] if batch.groups else ""
            sums.add(name, group, vqa_accuracy(texts[row], batch.answers[row]))
