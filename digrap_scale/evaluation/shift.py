"""Degree of shift: how far a test set's embeddings lie from the training set's, and whether accuracy falls with it.

    d(set) = mean over its samples z of √((z − μ)ᵀ Σ⁻¹ (z − μ))        Mahalanobis 1936; DiGraP's paper, on degrees of shift

μ and Σ are the training set's mean and covariance. Σ is shrunk towards a multiple of the identity, since there may be
fewer samples than dimensions: S = (1/n) Σ (z − μ)(z − μ)ᵀ, m = tr(S)/p,

    Σ = (1 − ρ) S + ρ m I,     ρ = min(1, (‖S‖²/p² + m²) / ((n + 1)(‖S‖²/p² − m²/p)))       (‖·‖ Frobenius)

which is the oracle approximating shrinkage (OAS; Chen, Wiesel, Eldar, Hero 2010, arXiv 0907.4698, as scikit-learn
writes it). It is chosen over Ledoit and Wolf's because it needs n and S alone: S streams and adds up over ranks, and no
second pass over the training set is needed. Everything is float64.
"""

# n samples, p dimensions of an embedding, B samples of a batch

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from digrap_scale.errors import NonFiniteError
from digrap_scale.types import Batch

Reduce = Callable[[torch.Tensor], None]
# (model, batch) → name → ([B, p] vectors, [B] which of them count)
Embed = Callable[[Any, Batch], Mapping[str, tuple[torch.Tensor, torch.Tensor]]]
LEAST_SETS = 3  # fewer points always lie on a line
_FLAT = 1e-12  # variance ÷ mean square below which float32 embeddings are all the same


class Moments:
    """Mean and scatter of vectors that come in batches: Chan, Golub and LeVeque's update (1979), exact but for rounding.

    Attributes:
        count: vectors so far.
        mean: [p] float64.
        scatter: [p, p] float64, Σ (z − mean)(z − mean)ᵀ.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, vectors: torch.Tensor) -> None:
        """Takes in a batch [B, p], maybe empty."""
        samples = len(vectors)
        if samples == 0:
            return
        vectors = vectors.double()
        mean = vectors.mean(dim=0)
        centred = vectors - mean
        delta = mean - self.mean
        total = self.count + samples
        self.scatter.addmm_(centred.T, centred)
        self.scatter.addr_(delta, delta, alpha=self.count * samples / total)
        self.mean += delta * (samples / total)
        self.count = total

    def reduce_(self, reduce_: Reduce | None) -> None:
        """Those of all ranks together, on every rank; ``reduce_`` sums a tensor over ranks in place. Collective.

        Two sums: counts and means first, then each rank's scatter about the common mean.
        """
        if reduce_ is None:
            return
        sums = torch.cat([self.mean * self.count, self.mean.new_tensor([self.count])])
        reduce_(sums)
        count = int(sums[-1].item())
        if count:
            mean = sums[:-1] / count
            delta = self.mean - mean
            self.scatter.addr_(delta, delta, alpha=self.count)
            self.mean = mean
        reduce_(self.scatter)
        self.count = count

    def shrunk_covariance(self) -> torch.Tensor:
        """[p, p] float64: Σ of the module's docstring. Needs at least one vector."""
        covariance = self.scatter / self.count
        size = len(covariance)
        mean_variance = covariance.trace() / size
        mean_square = covariance.square().mean()
        spread = (self.count + 1) * (mean_square - mean_variance**2 / size)
        shrinkage = 1.0 if float(spread) <= 0 else min(1.0, float((mean_square + mean_variance**2) / spread))
        shrunk = (1 - shrinkage) * covariance
        shrunk.diagonal().add_(shrinkage * mean_variance)
        return shrunk

    @property
    def is_flat(self) -> bool:
        """Whether the vectors are all the same, up to what float32 resolves."""
        variance = float(self.scatter.trace()) / max(self.count, 1)
        return variance <= _FLAT * float(self.mean.square().sum())


class Whitened:
    """Distances to a training set: √((z − μ)ᵀ Σ⁻¹ (z − μ)), through Σ's Cholesky factor."""

    def __init__(self, moments: Moments) -> None:
        self.mean = moments.mean
        self.factor = torch.linalg.cholesky(moments.shrunk_covariance())

    def distances(self, vectors: torch.Tensor) -> torch.Tensor:
        """[B, p] → [B] float64."""
        centred = vectors.double() - self.mean
        return torch.linalg.solve_triangular(self.factor, centred.T, upper=False).norm(dim=0)


@dataclass
class ShiftDegrees:
    """Embedding's name → mean distance, for every test set; and what could not be measured, a line each."""

    of: dict[str, dict[str, float]]
    notes: list[str] = field(default_factory=list)


def measure_shift(
    model: Any,
    embed: Embed,
    training: Iterable[Batch],
    loaders: Mapping[str, Iterable[Batch]],
    *,
    device: torch.device | str,
    reduce_: Reduce | None = None,
) -> ShiftDegrees:
    """The degree of shift of every test set, with the model's embeddings as they are now.

    The caller puts the model into evaluation mode. Every rank must go through the same number of batches of each set, one
    at least, as the model's own collectives need; counts of samples may differ, and padding does not count.

    Args:
        model: what ``embed`` calls.
        embed: a batch's embeddings.
        training: batches of the training set.
        loaders: test set → batches.
        device: where batches go.
        reduce_: sums a tensor over all ranks, in place; None for one process.

    Raises:
        NonFiniteError: embeddings that are not finite.
    """
    moments: dict[str, Moments] = {}
    with torch.no_grad():
        for batch in training:
            for name, (vectors, counted) in embed(model, batch.to(device)).items():
                kept = vectors[counted]
                moments.setdefault(name, Moments(vectors.shape[1], vectors.device)).add(kept)
        whitened: dict[str, Whitened] = {}
        notes = []
        for name, one in moments.items():
            one.reduce_(reduce_)
            if one.count < 2:
                notes.append(f"degree of shift, {name}: {one.count} training sample(s) have it; not measured")
            elif not math.isfinite(float(one.scatter.sum())):
                raise _not_finite("the training set", name)
            elif one.is_flat:
                notes.append(f"degree of shift, {name}: the same in every training sample; not measured")
            else:
                whitened[name] = Whitened(one)
        degrees = ShiftDegrees({}, notes)
        for name, batches in loaders.items():
            degrees.of[name] = _mean_distances(model, embed, batches, whitened, device, reduce_)
            for part, distance in degrees.of[name].items():
                if not math.isfinite(distance):
                    raise _not_finite(f"test set {name}", part)
    return degrees


def _not_finite(where: str, part: str) -> NonFiniteError:
    error = NonFiniteError(f"evaluation.shift_degree: {where}: the {part} embeddings are not finite; check the weights")
    error.agreed = True  # every rank has the reduced numbers
    return error


def _mean_distances(
    model: Any,
    embed: Embed,
    batches: Iterable[Batch],
    whitened: Mapping[str, Whitened],
    device: torch.device | str,
    reduce_: Reduce | None,
) -> dict[str, float]:
    """Embedding's name → mean distance over all ranks' samples; one without a sample is left out."""
    if not whitened:
        return {}
    sums_P2 = torch.zeros(len(whitened), 2, dtype=torch.float64, device=device)
    for batch in batches:
        found = embed(model, batch.to(device))
        for sums_2, (name, one) in zip(sums_P2, whitened.items(), strict=True):
            vectors, counted = found[name]
            distances_B = one.distances(vectors[counted])
            sums_2 += torch.stack([distances_B.sum(), distances_B.new_tensor(float(len(distances_B)))])
    if reduce_ is not None:
        reduce_(sums_P2)
    totals = sums_P2.tolist()
    return {name: total / count for name, (total, count) in zip(whitened, totals, strict=True) if count}


def pearson(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's correlation; None for fewer than ``LEAST_SETS`` points or where one side does not vary."""
    if len(first) < LEAST_SETS:
        return None
    x, y = (np.asarray(side, dtype=np.float64) for side in (first, second))
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return max(-1.0, min(1.0, float(x @ y) / norm)) if norm > 0 else None


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation: Pearson's of the ranks, equals sharing their mean rank."""
    return pearson(_ranks(first), _ranks(second))


def _ranks(values: Sequence[float]) -> list[float]:
    array = np.asarray(values, dtype=np.float64)
    below = (array[:, None] > array[None, :]).sum(axis=1)
    equal = (array[:, None] == array[None, :]).sum(axis=1)
    return [float(rank) for rank in below + (equal - 1) / 2]
