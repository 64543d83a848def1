"""What the trials found, put together: a row a method, with its results by domain and seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from digrap_scale.compare.cost import Cost
from digrap_scale.compare.grid import Setting, Trial
from digrap_scale.config.data_checks import VALIDATION
from digrap_scale.errors import ConfigError
from digrap_scale.evaluation.report import read_report
from digrap_scale.evaluation.suite import SuiteResult
from digrap_scale.training.log import read_status

# Means that a table has beside single test sets.
MEANS: dict[str, tuple[str, ...]] = {
    "ID mean": ("id",),
    "near mean": ("near",),
    "far mean": ("far",),
    "OOD mean": ("near", "far"),
}


def results_of(trial: Trial) -> list[SuiteResult] | None:
    """A finished trial's results: of its weights, then of each interpolation; None if it has not finished.

    Raises:
        ConfigError: its results cannot be read.
    """
    run = trial.folder / "run"
    file = run / "results.json" if trial.verb == "train" else run / "evaluation" / "results.json"
    if not file.is_file() or (trial.verb == "train" and _state(run) != "done"):
        return None
    try:
        return [row.result for row in read_report(file)[0]]
    except ConfigError as error:
        damage = str(error).removesuffix("; evaluate again")
        raise ConfigError(f"{damage}; delete {trial.folder} to run it again") from None


def _state(run: Path) -> str | None:
    try:
        return (read_status(run) or {}).get("state")
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"{run / 'status.json'}: cannot be read ({error}); delete the folder to train it again"
        ) from None


def validation_of(result: SuiteResult) -> float:
    """Accuracy on what was withheld from training."""
    return result.sets[VALIDATION].accuracy


@dataclass
class Row:
    """A method in the table.

    Attributes:
        name: shown.
        results: domain → seed → result; the seed is None for weights that have none.
        settings: domain → what was chosen, in words.
        trials: domain → seed → the run that it comes from; empty for rows without runs of their own.
    """

    name: str
    results: dict[str, dict[int | None, SuiteResult]] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    trials: dict[str, dict[int, Trial]] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchPoint:
    """A setting that was tried in a domain: its results on the seeds of the search, and the runs that they are of."""

    domain: str
    method: str
    setting: Setting
    results: Sequence[SuiteResult]
    trials: Sequence[Trial]

    @property
    def validation(self) -> list[float]:
        """Accuracies on ID validation."""
        return [validation_of(result) for result in self.results]

    def mean(self, *shifts: str) -> float:
        """Mean over seeds of the mean over test sets with one of these shifts."""
        return fmean(score(result, shifts) for result in self.results)


@dataclass
class Comparison:
    """All that is shown.

    Attributes:
        rows: methods in the table's order.
        baseline: the name of the row that others are subtracted from.
        points: everything that the search tried.
        curve: WiSE-FT: α → domain → results of all seeds.
        notes: lines that the tables need to be read rightly.
        failed: lines about trials that failed.
        costs: method → what a step of it took.
    """

    rows: list[Row]
    baseline: str
    points: list[SearchPoint]
    curve: dict[float, dict[str, list[SuiteResult]]]
    notes: list[str]
    failed: list[str]
    confidence: float
    bootstrap_samples: int
    costs: dict[str, Cost] = field(default_factory=dict)


def shown_runs(comparison: Comparison) -> dict[str, list[tuple[str, Path]]]:
    """Domain → (method, folder of its run with the first seed); domains in the order of their pictures."""
    found: dict[str, list[tuple[str, Path]]] = {}
    for row in comparison.rows:
        for domain, trials in row.trials.items():
            if trials:
                found.setdefault(domain, []).append((row.name, next(iter(trials.values())).folder / "run"))
    return found


def domains_of(comparison: Comparison) -> list[str]:
    """Every domain that some row has, in the rows' order."""
    return list(dict.fromkeys(domain for row in comparison.rows for domain in row.results))


def whole(comparison: Comparison) -> list[Row]:
    """The rows that have every domain, and a seed in all of them: means over domains of others would be of other domains."""
    rows = [row for row in comparison.rows if set(row.results) == set(domains_of(comparison))]
    return [row for row in rows if set.intersection(*(set(seeds) for seeds in row.results.values()))]


def score(result: SuiteResult, shifts: Sequence[str]) -> float:
    """Mean accuracy over the test sets with one of these shifts. There must be one."""
    return fmean(one.accuracy for one in result.sets.values() if one.shift in shifts)


def columns_of(results: Sequence[SuiteResult]) -> list[str]:
    """Titles of a domain's table: ID sets, OOD sets, then the means of which there are several sets or kinds.

    Raises:
        ConfigError: the results are of different test sets.
    """
    first = {name: one.shift for name, one in results[0].sets.items()}
    for result in results[1:]:
        if {name: one.shift for name, one in result.sets.items()} != first:
            raise ConfigError(
                f"a trial has the test sets {', '.join(result.sets)}, expected {', '.join(first)}; delete its folder"
            )
    return [
        *(name for name, shift in first.items() if shift == "id"),
        *(name for name, shift in first.items() if shift in ("near", "far")),
        *means_of(results[0]),
    ]


def means_of(result: SuiteResult) -> list[str]:
    """The means that say more than a single test set does, of those that a result has."""
    kinds = [one.shift for one in result.sets.values()]
    found = ["ID mean"] if kinds.count("id") > 1 else []
    found += ["near mean", "far mean"] if {"near", "far"} <= set(kinds) else []
    return [*found, "OOD mean"]


def value(result: SuiteResult, column: str) -> float:
    """A column's accuracy: that of a test set, or a mean."""
    return result.sets[column].accuracy if column in result.sets else score(result, MEANS[column])


def by_seed(results: Mapping[str, Mapping[int | None, SuiteResult]], column: str) -> dict[int | None, float]:
    """Seed → mean over domains of a column, for the seeds that every domain has."""
    common = set.intersection(*(set(of_domain) for of_domain in results.values())) if results else set()
    ordered = [seed for seed in next(iter(results.values()))] if results else []
    return {
        seed: fmean(value(of_domain[seed], column) for of_domain in results.values())
        for seed in ordered
        if seed in common
    }
