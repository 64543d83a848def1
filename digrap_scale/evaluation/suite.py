"""A model's accuracy on a suite of ID and OOD test sets. Shapes: B samples in a batch, C classes, S test sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Literal, Protocol, cast

import torch
from torch import nn

from digrap_scale.errors import ConfigError
from digrap_scale.evaluation import metrics
from digrap_scale.evaluation.generated import Gather, Generate, GeneratingTask, ScoreSums, score_batch
from digrap_scale.evaluation.shift import ShiftDegrees, pearson, spearman
from digrap_scale.types import Batch

# ``validation`` is no result: it is what hyper-parameters are selected by, see ``data.hold_out``.
Shift = Literal["id", "near", "far", "validation"]
SHIFTS: tuple[Shift, ...] = ("id", "near", "far", "validation")
Modality = Literal["none", "vision", "question", "answer", "multimodal", "adversarial", "other"]


class EvaluationTask(Protocol):
    """What the suite needs of a task."""

    @property
    def class_names(self) -> list[str]: ...

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """[B, C] logits of the batch."""
        ...


@dataclass(frozen=True)
class SetResult:
    """One test set.

    Attributes:
        shift: how far it is from the training data.
        accuracy: right ÷ samples, or the mean score of generated answers, in [0, 1].
        standard_error: of ``accuracy``: √(variance of the scores ÷ samples), which for right and wrong is the binomial.
        samples: real samples, over all ranks.
        class_accuracy: class name (of answers: type of question) → accuracy on its samples; classes without samples are
            left out.
        modality: what has shifted.
        shift_degree: embedding (vision, question, joint) → mean Mahalanobis distance to the training set; empty where it
            was not measured.
    """

    shift: Shift
    accuracy: float
    standard_error: float
    samples: int
    class_accuracy: dict[str, float]
    modality: Modality = "none"
    shift_degree: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SuiteResult:
    """All test sets, in the suite's order. Means are plain means over sets; None where there is no such set.

    Attributes:
        sets: name → result.
        notes: lines that a reader needs: what could not be measured, and why.
    """

    sets: dict[str, SetResult]
    notes: list[str] = field(default_factory=list)

    def mean(self, *shifts: Shift) -> float | None:
        """Plain mean of the accuracies of the sets with one of these shifts."""
        chosen = [one.accuracy for one in self.sets.values() if one.shift in shifts]
        return fmean(chosen) if chosen else None

    def error(self, *shifts: Shift) -> float | None:
        """Standard error of ``mean`` (sampling of the test sets only, not the seed of the training)."""
        chosen = [one.standard_error for one in self.sets.values() if one.shift in shifts]
        return metrics.mean_standard_error(chosen) if chosen else None

    @property
    def id_mean(self) -> float | None:
        return self.mean("id")

    @property
    def near_mean(self) -> float | None:
        return self.mean("near")

    @property
    def far_mean(self) -> float | None:
        return self.mean("far")

    @property
    def ood_mean(self) -> float | None:
        """Mean over near and far sets alike."""
        return self.mean("near", "far")

    def with_shift_degrees(self, degrees: ShiftDegrees) -> SuiteResult:
        """The same with the degree of shift of each test set; what is withheld to select by has none."""
        sets = {
            name: one if one.shift == "validation" else replace(one, shift_degree=degrees.of[name])
            for name, one in self.sets.items()
        }
        return SuiteResult(sets, [*self.notes, *degrees.notes])

    @property
    def shift_correlations(self) -> dict[str, dict[str, Any]]:
        """Embedding → ``pearson`` and ``spearman`` of degree of shift and accuracy over the ``sets`` (their number) that
        have both, ID ones included. None where there are too few sets or nothing varies."""
        found = {}
        for part in dict.fromkeys(part for one in self.sets.values() for part in one.shift_degree):
            pairs = [(one.shift_degree[part], one.accuracy) for one in self.sets.values() if part in one.shift_degree]
            degrees, accuracies = zip(*pairs, strict=True)
            found[part] = {
                "pearson": pearson(degrees, accuracies),
                "spearman": spearman(degrees, accuracies),
                "sets": len(pairs),
            }
        return found

    def to_dict(self) -> dict[str, Any]:
        """As JSON: every set, the means, and how accuracy goes with the degree of shift."""
        return {
            "sets": {name: dict(vars(one)) for name, one in self.sets.items()},
            "id_mean": self.id_mean,
            "near_mean": self.near_mean,
            "far_mean": self.far_mean,
            "ood_mean": self.ood_mean,
            "shift_correlations": self.shift_correlations,
            "notes": self.notes,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> SuiteResult:
        """Back from ``to_dict``; the means are computed anew. Raises: ConfigError where keys are missing."""
        try:
            sets = {name: SetResult(**one) for name, one in stored["sets"].items()}
            notes = [str(note) for note in stored.get("notes", [])]
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"not a stored suite result ({type(error).__name__}: {error}); evaluate again") from error
        for name, one in sets.items():
            if one.shift not in SHIFTS:
                raise ConfigError(
                    f"stored test set {name}: shift is {one.shift!r}, expected one of {', '.join(SHIFTS)}"
                )
        return cls(sets, notes)


def evaluate_suite(
    model: nn.Module,
    task: EvaluationTask,
    loaders: Mapping[str, Iterable[Batch]],
    shifts: Mapping[str, Shift],
    *,
    device: torch.device | str,
    reduce_: Callable[[torch.Tensor], None] | None = None,
    generate: Generate | None = None,
    gather: Gather | None = None,
    modalities: Mapping[str, Modality] | None = None,
) -> SuiteResult:
    """Accuracy on every test set, summed over ranks.

    Every rank must go through the same number of batches of each set, as the model's own collectives need; padding
    carries label −1. Counts are reduced once for the whole suite: [S, 2, C] int64; of a task that generates, float64 sums
    of scores and of their squares, and counts, by set and group.

    Args:
        model: put into evaluation mode, and every module back into the mode that it had.
        task: gives ``logits(model, batch)`` [B, C] and ``class_names``; or, a ``GeneratingTask``, texts.
        loaders: test set → batches, in the table's order.
        shifts: test set → "id", "near" or "far".
        device: where batches go.
        reduce_: sums a tensor over all ranks, in place; None for one process.
        generate: the engine's generation, for a task that needs it.
        gather: every rank's value of an object, on every rank; None for one process.
        modalities: test set → what has shifted in it; "none" where it says nothing.

    Raises:
        ConfigError: a set without shift, without labels, with labels out of range or without a single real sample.
    """
    problems = [
        f"test set {name}: shift is {shifts.get(name)!r}, expected one of {', '.join(SHIFTS)}"
        for name in loaders
        if shifts.get(name) not in SHIFTS
    ]
    if not loaders:
        problems.append("evaluation.suite is empty; name at least one test set")
    if problems:
        raise ConfigError(problems)
    if getattr(task, "generates", False):
        return _evaluate_generated(
            model, cast(GeneratingTask, task), loaders, shifts, modalities or {}, device, generate, gather
        )
    counts_S2C = torch.zeros(len(loaders), 2, len(task.class_names), dtype=torch.int64, device=device)
    with evaluation_mode(model), torch.no_grad():  # not inference_mode: FSDP2's views outlive the block
        for counts_2C, (name, batches) in zip(counts_S2C, loaders.items(), strict=True):
            for batch in batches:
                counts_2C += _count(model, task, batch.to(device), name)
    if reduce_ is not None:
        reduce_(counts_S2C)
    sets: dict[str, SetResult] = {}
    for counts_2C, name in zip(counts_S2C.cpu(), loaders, strict=True):
        right, samples = cast(list[int], counts_2C.sum(-1).tolist())
        if not samples:
            raise ConfigError(f"test set {name} has no sample; check its shards in evaluation.suite")
        by_class = {
            title: metrics.accuracy(int(hit), int(all_))
            for title, hit, all_ in zip(task.class_names, counts_2C[0], counts_2C[1], strict=True)
            if all_
        }
        sets[name] = SetResult(
            shifts[name],
            metrics.accuracy(right, samples),
            metrics.standard_error(right, samples),
            samples,
            by_class,
            (modalities or {}).get(name, "none"),
        )
    return SuiteResult(sets)


def _evaluate_generated(
    model: nn.Module,
    task: GeneratingTask,
    loaders: Mapping[str, Iterable[Batch]],
    shifts: Mapping[str, Shift],
    modalities: Mapping[str, Modality],
    device: torch.device | str,
    generate: Generate | None,
    gather: Gather | None,
) -> SuiteResult:
    assert generate is not None, "a task that generates needs the engine's generation"
    sums = ScoreSums()
    with evaluation_mode(model), torch.no_grad():
        for name, batches in loaders.items():
            for batch in batches:
                score_batch(task, generate, batch.to(device), name, sums)
    if gather is not None:
        sums = ScoreSums.merged(gather(sums.sums))
    sets: dict[str, SetResult] = {}
    for name in loaders:
        mean, error, samples = sums.of(name)
        if not samples:
            raise ConfigError(f"test set {name} has no sample; check its shards in evaluation.suite")
        sets[name] = SetResult(shifts[name], mean, error, samples, sums.groups(name), modalities.get(name, "none"))
    return SuiteResult(sets)


def _count(model: nn.Module, task: EvaluationTask, batch: Batch, name: str) -> torch.Tensor:
    if batch.labels is None:
        raise ConfigError(f"test set {name} has no labels; accuracy needs a class name in each sample's JSON")
    logits_BC = task.logits(model, batch)
    if logits_BC.shape[-1] != len(task.class_names):
        raise ConfigError(
            f"test set {name}: the model gives {logits_BC.shape[-1]} logits, expected {len(task.class_names)} (classes)"
        )
    try:
        return metrics.count_correct(logits_BC, batch.labels)
    except ValueError as error:
        raise ConfigError(f"test set {name}: {error}") from error


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block. Every module gets its own mode back: frozen BatchNorm stays frozen."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
