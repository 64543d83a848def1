"""Every run's numbers, for ``results.json``: what a reader needs to take means, differences and intervals of their own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from digrap_scale.compare.grid import Trial
from digrap_scale.compare.results import Comparison, Row
from digrap_scale.errors import ConfigError
from digrap_scale.evaluation.layers import read_layers
from digrap_scale.evaluation.strength import read_lines
from digrap_scale.evaluation.suite import SuiteResult
from digrap_scale.training.environment import ENVIRONMENT_FILE


def runs(comparison: Comparison) -> list[dict[str, Any]]:
    """A line for each method, domain and seed of the table: accuracies by test set, and ‖θ − θ₀‖ where it was logged."""
    return [
        {"method": row.name, "domain": domain, "seed": seed, **_found(result, _trial(row, domain, seed))}
        for row in comparison.rows
        for domain, of_domain in row.results.items()
        for seed, result in of_domain.items()
    ]


def search(comparison: Comparison) -> list[dict[str, Any]]:
    """A line for each setting that was tried: validation, by which it was judged, and the runs' numbers, by which it was not."""
    return [
        {
            "domain": point.domain,
            "method": point.method,
            "setting": dict(point.setting),
            "validation": point.validation,
            "runs": [
                {"seed": trial.seed, **_found(result, trial)}
                for result, trial in zip(point.results, point.trials, strict=True)
            ],
        }
        for point in comparison.points
    ]


def curve(comparison: Comparison) -> dict[str, dict[str, list[dict[str, float]]]]:
    """WiSE-FT: α → domain → accuracies of each seed's run."""
    return {
        f"{alpha:g}": {domain: [_accuracies(result) for result in results] for domain, results in of_alpha.items()}
        for alpha, of_alpha in comparison.curve.items()
    }


def environment(comparison: Comparison) -> dict[str, Any]:
    """Versions, platform, device and git state of the first run, and every commit that a run of the tables was made at; {}
    where none has told."""
    told = [
        _environment(trial.folder / "run")
        for row in comparison.rows
        for of_domain in row.trials.values()
        for trial in of_domain.values()
    ]
    told = [one for one in told if one]
    states = [(one.get("git") or {}).get("package") or {} for one in told]
    commits = sorted({state["commit"] for state in states if "commit" in state})
    return {**told[0], "commits": commits} if told else {}


def _trial(row: Row, domain: str, seed: int | None) -> Trial | None:
    return None if seed is None else row.trials.get(domain, {}).get(seed)


def _found(result: SuiteResult, trial: Trial | None) -> dict[str, Any]:
    distance = None if trial is None else _distance(trial.folder / "run")
    return {"accuracy": _accuracies(result)} | ({} if distance is None else {"distance": distance})


def _accuracies(result: SuiteResult) -> dict[str, float]:
    return {name: one.accuracy for name, one in result.sets.items()}


def _distance(run: Path) -> float | None:
    """‖θ − θ₀‖ over all layers before the last step."""
    history = read_layers(run)
    return None if history is None else float(f"{math.sqrt(float((history.drift[-1] ** 2).sum())):.6g}")


def _environment(run: Path) -> dict[str, Any]:
    path = run / ENVIRONMENT_FILE
    lines = [line for _, line in read_lines(path)]
    if not lines:
        if path.is_file():
            raise ConfigError(f"{path}: has no whole line; delete the trial's folder")
        return {}
    told = lines[-1]  # of the last start
    return {key: told[key] for key in ("versions", "platform", "processor", "cores", "device", "git") if key in told}
