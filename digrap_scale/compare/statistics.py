"""Means over seeds, and paired differences with an interval. Plain numbers in, plain numbers out.

A difference is taken between two methods' runs that share domain and seed (and so the order of samples and the crops):
what the seed does to both cancels.
"""

# R resamples, n units

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

FEWEST_UNITS = 3  # of an interval
_EQUAL = 1e-12  # accuracies are counts over some hundred pictures: what differs less is rounding


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and its standard error s/√n with s² = Σ (x − mean)²/(n − 1); None for a single value."""
    numbers = np.asarray(values, dtype=np.float64)
    error = float(numbers.std(ddof=1)) / math.sqrt(len(numbers)) if len(numbers) > 1 else None
    return float(numbers.mean()), error


@dataclass(frozen=True)
class Difference:
    """A mean paired difference.

    Attributes:
        mean: over domains, of means over seeds.
        low, high: the interval; None where there are one or two units only, or all are equal.
        kind: how the interval was made, in words; empty without one.
        pairs: pairs of runs.
        of_domains: where the interval is over the pairs of several domains, Student's interval with the domain as the unit, which
            speaks of other domains of the kind; None with fewer than three domains, or where all agree.
    """

    mean: float
    low: float | None
    high: float | None
    kind: str
    pairs: int
    of_domains: tuple[float, float] | None = None

    @property
    def how(self) -> str:
        """How the interval was made, or why there is none."""
        few = self.pairs < FEWEST_UNITS
        return self.kind or f"no interval: {f'fewer than {FEWEST_UNITS} pairs' if few else 'all differences are equal'}"

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def paired_difference(
    differences: Mapping[str, Sequence[float]], *, confidence: float = 0.95, samples: int = 10_000
) -> Difference:
    """The mean of paired differences, with an interval.

    **The unit that is resampled.** With enough domains (below) it is the domain, with all of its seeds: the interval then speaks
    of other domains of the kind. With fewer it is the pair, (domain, seed), of all domains together: the interval speaks of these
    domains and other seeds; it takes the spread between domains for noise, and is the wider for it. Student's interval with the
    domain as the unit stands beside it (``of_domains``) from three domains on.

    **The interval.** A bootstrap mean never leaves the range of the data, and the range of n values holds the middle of their
    distribution with probability 1 − 2^(1−n) at most: no bootstrap of 5 units reaches 95 per cent, whatever its form. So

    - n with 1 − 2^(1−n) ≥ confidence (6 for 95 per cent): the *expanded* percentile bootstrap, whose quantiles are moved
      outwards from α/2 to Φ(−√(n/(n−1)) · t_{α/2, n−1}), since the plain one is too narrow by √((n−1)/n) and by t against the
      normal (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", The American Statistician 69);
    - fewer, but three: Student's t, mean ± t · s/√n, exact for normal differences, which is the least that must be assumed of so
      few;
    - one or two, or any number that are all equal: none. Accuracies are counts, so that differences may well agree, and an
      interval without width would exclude 0 by chance alone.

    Where domains have unequal numbers of seeds, pairs keep the weight that they have in the mean over domains: a resample's mean
    is that of what was drawn, weighted, and Student's s²/n becomes Σ (w (x − mean))² / (n (n − 1)), with w of mean 1.

    Args:
        differences: domain → a difference for each seed; every domain has one at least. Domains weigh alike.
        confidence: of the interval, two-sided.
        samples: bootstrap resamples. They are drawn by a fixed seed: the same numbers give the same interval.
    """
    by_domain = [np.asarray(values, dtype=np.float64) for values in differences.values()]
    pairs = sum(len(values) for values in by_domain)
    means = np.array([values.mean() for values in by_domain])
    least = least_units(confidence)
    of_domains = len(by_domain) >= max(least, FEWEST_UNITS)
    if of_domains:
        units, weights, unit = means, np.ones(len(means)), "domains"
    else:
        units, unit = np.concatenate(by_domain), "pairs"
        weights = np.concatenate([np.full(len(v), pairs / (len(v) * len(by_domain))) for v in by_domain])
    mean, count = float(means.mean()), len(units)
    one_each = count == len(means)  # the units are the domains already
    beside = None if one_each else _students_interval(means, np.ones(len(means)), mean, confidence)
    if count < least:
        interval = _students_interval(units, weights, mean, confidence)
        if interval is not None:
            return Difference(mean, *interval, f"Student's t over {count} {unit}", pairs, beside)
    if count < least or np.ptp(units) < _EQUAL:
        return Difference(mean, None, None, "", pairs, beside)
    quantile = student_quantile((1 + confidence) / 2, count - 1)
    generator = np.random.Generator(np.random.PCG64(20150219))
    drawn = generator.integers(count, size=(samples, count))
    resampled_R = np.average(units[drawn], axis=1, weights=weights[drawn])
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * quantile)
    low, high = np.quantile(resampled_R, [tail, 1 - tail])
    return Difference(mean, float(low), float(high), f"bootstrap over {count} {unit}", pairs, beside)


def _students_interval(
    units: np.ndarray, weights: np.ndarray, mean: float, confidence: float
) -> tuple[float, float] | None:
    """mean ± t · s/√n of weighted ``units``, [n]; None for one or two, or where all are equal."""
    count = len(units)
    if count < FEWEST_UNITS or np.ptp(units) < _EQUAL:
        return None
    quantile = student_quantile((1 + confidence) / 2, count - 1)
    half = quantile * math.sqrt(float(np.square(weights * (units - mean)).sum()) / (count * (count - 1)))
    return mean - half, mean + half


def least_units(confidence: float) -> int:
    """Fewest units whose range can reach ``confidence``: the least n with 1 − 2^(1−n) ≥ confidence."""
    return math.ceil(1 - math.log2(1 - confidence) - 1e-9)


def student_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t with ``freedom`` degrees, by bisection of its distribution function."""
    low, high = -1.0, 1.0
    while student_cdf(high, freedom) < probability:
        high *= 2
    while student_cdf(low, freedom) > probability:
        low *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def student_cdf(t: float, freedom: int) -> float:
    """P(T ≤ t): the finite series for whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    theta = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(theta), math.cos(theta)
    if freedom % 2:
        term, total = cosine, 0.0
        for k in range(1, freedom - 1, 2):
            total += term
            term *= cosine**2 * (k + 1) / (k + 2)
        return 0.5 + (theta + sine * total) / math.pi
    term, total = 1.0, 0.0
    for k in range(0, freedom, 2):
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    return 0.5 + sine * total / 2
