"""Conflicts and drift per layer over time, as a run keeps them in ``layers.jsonl``. Shapes: T snapshots, L layers.

A line is ``{"names": [...]}`` (the layers of the rows below it) or ``{"step": 20, "steps": 10, "conflict_rate": [...],
"drift": [...]}``, where ``steps`` tells how many steps the rate is of.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from digrap_scale.errors import ConfigError
from digrap_scale.evaluation.strength import read_lines

LAYERS_FILE = "layers.jsonl"


@dataclass(frozen=True)
class LayerHistory:
    """Conflicts and drift over a run.

    Attributes:
        steps: [T] optimizer steps done at each snapshot, rising.
        counted: [T] steps that each snapshot's rates are of.
        names: [L] layers, in the model's order.
        conflict_rate: [T, L] share of the counted steps in which the layer was in conflict.
        drift: [T, L] ‖θ − θ₀‖ before the snapshot's step.
    """

    steps: list[int]
    counted: list[int]
    names: list[str]
    conflict_rate: np.ndarray
    drift: np.ndarray

    @property
    def whole_rate(self) -> np.ndarray:
        """[L]: the conflict rate over the whole run."""
        return np.average(self.conflict_rate, axis=0, weights=self.counted)


def encode_layers(step: int, steps: int, conflict_rate: Sequence[float], drift: Sequence[float]) -> str:
    """The line of one snapshot, in six digits."""
    row = {"step": step, "steps": steps, "conflict_rate": _short(conflict_rate), "drift": _short(drift)}
    return json.dumps(row) + "\n"


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def read_layers(folder: str | Path) -> LayerHistory | None:
    """A run's layers; None where it has written none.

    Raises:
        ConfigError: a line other than a torn last one is not readable, or layers changed in between.
    """
    path = Path(folder) / LAYERS_FILE
    names: list[str] = []
    rows: dict[int, tuple[int, list[float], list[float]]] = {}
    for number, line in read_lines(path):
        if "names" in line:
            if names and names != line["names"]:
                raise ConfigError(f"{path}, line {number}: expected the layers of its first line, found others")
            names = [str(name) for name in line["names"]]
            continue
        rate, drift = line.get("conflict_rate"), line.get("drift")
        if not (isinstance(rate, list) and isinstance(drift, list) and len(rate) == len(drift) == len(names)):
            raise ConfigError(f"{path}, line {number}: expected {len(names)} values; the file is damaged, remove it")
        rows[int(line["step"])] = int(line["steps"]), rate, drift
    if not rows:
        return None
    steps = sorted(rows)
    counted, rates, drifts = zip(*(rows[step] for step in steps), strict=True)
    return LayerHistory(steps, list(counted), names, np.array(rates), np.array(drifts))
