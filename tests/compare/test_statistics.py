"""Means, errors and intervals against numbers computed by hand, tables of Student's t, and coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from digrap_scale.compare.statistics import (
    least_units,
    mean_and_error,
    paired_difference,
    student_cdf,
    student_quantile,
)


def test_mean_and_error() -> None:
    # 2, 4, 9: mean 5, s² = (9 + 1 + 16)/2 = 13, error √(13/3)
    assert mean_and_error([2, 4, 9]) == (5.0, pytest.approx(math.sqrt(13 / 3)))
    assert mean_and_error([0.25]) == (0.25, None)


@pytest.mark.parametrize(
    ("probability", "freedom", "table"),
    [(0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 3, 3.182), (0.95, 4, 2.132), (0.975, 9, 2.262), (0.995, 30, 2.750)],
)
def test_quantiles_are_those_of_the_tables(probability: float, freedom: int, table: float) -> None:
    assert student_quantile(probability, freedom) == pytest.approx(table, abs=6e-4)
    assert student_quantile(1 - probability, freedom) == pytest.approx(-table, abs=6e-4)
    assert student_cdf(0.0, freedom) == 0.5


def test_a_bootstrap_needs_so_many_units() -> None:
    assert [least_units(c) for c in (0.5, 0.75, 0.9, 0.95, 0.99)] == [2, 3, 5, 6, 8]
    for confidence in (0.8, 0.95, 0.99):
        n = least_units(confidence)
        assert 1 - 2.0 ** (1 - n) >= confidence > 1 - 2.0 ** (2 - n)


def test_three_pairs_have_students_interval() -> None:
    # 1, 2, 6: mean 3, s² = (4 + 1 + 9)/2 = 7; 3 ± 4.3027 · √(7/3)
    found = paired_difference({"a": [1, 2, 6]})
    assert (found.mean, found.pairs, found.kind) == (3.0, 3, "Student's t over 3 pairs")
    assert found.low == pytest.approx(3 - 4.3027 * math.sqrt(7 / 3), abs=1e-3)
    assert found.high == pytest.approx(3 + 4.3027 * math.sqrt(7 / 3), abs=1e-3)
    assert not found.excludes_zero
    assert paired_difference({"a": [2.9, 3.0, 3.1]}).excludes_zero
    assert paired_difference({"a": [-2.9, -3.0, -3.1]}).excludes_zero


def test_two_pairs_have_none() -> None:
    found = paired_difference({"a": [5.0], "b": [5.0]})
    assert (found.mean, found.low, found.high, found.pairs) == (5.0, None, None, 2) and not found.excludes_zero


def test_two_domains_are_too_few_units_at_any_confidence() -> None:
    found = paired_difference({"a": [1.0, 2.0, 3.0], "b": [2.0, 3.0, 4.0]}, confidence=0.5)
    assert found.kind == "bootstrap over 6 pairs" and found.low is not None


def test_one_pair_has_none() -> None:
    found = paired_difference({"a": [5.0]})
    assert (found.mean, found.low, found.high, found.pairs) == (5.0, None, None, 1) and not found.excludes_zero


def test_domains_weigh_alike() -> None:
    """(1 + 3)/2 = 2 and 8: the mean is 5, not (1 + 3 + 8)/3, and pairs weigh ¾, ¾ and 1½ in it and in its error:
    s² = (¾·4)² + (¾·2)² + (1½·3)² = 31.5, over 3·2."""
    found = paired_difference({"a": [1, 3], "b": [8]})
    assert found.mean == 5.0
    assert found.high == pytest.approx(5 + 4.3027 * math.sqrt(31.5 / 6), abs=1e-3)


def test_unequal_numbers_of_seeds_are_no_spread() -> None:
    """One failed run must neither widen an interval much nor make one where all pairs agree."""
    assert paired_difference({"a": [0.05], "b": [0.05] * 5}).low is None
    near = paired_difference({"a": [0.055], "b": [0.054, 0.055, 0.056]})
    assert near.low is not None and near.low > 0.05
    generator = np.random.default_rng(0)
    held = []
    for _ in range(400):
        values = {name: generator.normal(0.05, 0.01, count) for name, count in (("a", 5), ("b", 5), ("c", 2))}
        found = paired_difference(values, samples=1000)  # type: ignore[arg-type]
        assert found.low is not None and found.high is not None and found.high - found.low < 0.03
        held.append(found.low <= 0.05 <= found.high)
    assert 0.88 <= np.mean(held) <= 0.99


def test_many_domains_are_what_is_resampled() -> None:
    """Six domains whose seeds agree: 12 pairs, but 6 independent numbers."""
    values = {f"d{i}": [float(i), float(i)] for i in range(6)}
    found = paired_difference(values)
    assert (found.kind, found.pairs, found.mean) == ("bootstrap over 6 domains", 12, 2.5)
    assert paired_difference({"a": [0, 1, 2], "b": [3, 4, 5]}).kind == "bootstrap over 6 pairs"


def test_domains_as_the_unit_stand_beside_pairs() -> None:
    """Means 1, 3 and 8: mean 4, s² = (9 + 1 + 16)/2 = 13; 4 ± 4.3027 · √(13/3), whatever their seeds do."""
    found = paired_difference({"a": [0, 2], "b": [3, 3], "c": [7, 9]})
    assert (found.kind, found.mean) == ("bootstrap over 6 pairs", 4.0) and found.of_domains is not None
    half = 4.3027 * math.sqrt(13 / 3)
    assert found.of_domains == (pytest.approx(4 - half, abs=1e-3), pytest.approx(4 + half, abs=1e-3))
    unequal = paired_difference({"a": [1], "b": [3], "c": [6, 7, 8, 9, 10]})
    assert unequal.of_domains == (pytest.approx(4 - half, abs=1e-3), pytest.approx(4 + half, abs=1e-3))
    assert paired_difference({"a": [0, 2], "b": [3, 5]}).of_domains is None  # two are too few
    assert paired_difference({"a": [0, 2], "b": [1, 1], "c": [2, 0]}).of_domains is None  # they agree
    assert (
        paired_difference({f"d{i}": [float(i)] for i in range(6)}).of_domains is None
    )  # the interval itself is of domains


def test_the_bootstrap_is_drawn_the_same_each_time_and_widened() -> None:
    values = {"a": [0.3, 1.1, -0.4, 2.0, 0.7, 1.6, 0.2]}
    found = paired_difference(values)
    assert found == paired_difference(values)
    numbers = np.array(values["a"])
    draws = np.random.default_rng(0).choice(numbers, size=(20_000, 7)).mean(axis=1)
    plain = np.quantile(draws, [0.025, 0.975])
    assert found.low is not None and found.high is not None
    assert found.low < plain[0] and found.high > plain[1]
    assert numbers.min() <= found.low and found.high <= numbers.max()


@pytest.mark.parametrize(("pairs", "least"), [(3, 0.93), (6, 0.90), (12, 0.92)])
def test_intervals_hold_the_truth_about_as_often_as_they_say(pairs: int, least: float) -> None:
    """1000 experiments with normal differences of mean 1; a plain percentile bootstrap of 3 would hold it in 3 of 4."""
    generator = np.random.default_rng(pairs)
    held = 0
    for _ in range(1000):
        found = paired_difference({"a": generator.normal(1.0, 1.0, pairs)}, samples=1000)  # type: ignore[dict-item]
        assert found.low is not None and found.high is not None
        held += found.low <= 1.0 <= found.high
    assert least <= held / 1000 <= 0.98
