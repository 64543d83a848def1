"""Small grids: with runs that are made up, in numbers that a test chooses, and with real ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from digrap_scale.compare import run
from digrap_scale.compare.grid import Trial
from digrap_scale.config.strict_yaml import dump
from digrap_scale.data.shards import write_shards
from digrap_scale.evaluation.layers import encode_layers
from digrap_scale.evaluation.report import ReportRow, to_json
from digrap_scale.evaluation.strength import STRENGTH_FILE, encode_names, encode_row
from digrap_scale.evaluation.suite import SetResult, SuiteResult
from tests.data.samples import make_samples
from tests.models.tiny import save_vit

SHIFTS = {"validation": "validation", "test": "id", "sketch": "near", "photo": "far"}
# Trial → accuracies in the order of SHIFTS, in tenths of a percent (one list, or one for each interpolation, too).
Numbers = Callable[[Trial], Sequence[Sequence[int]]]


def base_of(folder: Path) -> dict[str, Any]:
    """A run on tiny shards and a tiny model, which need not be there for a made-up run."""
    suite = [
        {"name": name, "shards": [f"{folder}/{name}-*.tar"], "shift": shift}
        for name, shift in SHIFTS.items()
        if shift != "validation"
    ]
    return {
        "run": {"folder": "unused"},
        "model": {"path": f"{folder}/model", "task": "classification"},
        "data": {
            "train": [f"{folder}/train-*.tar"],
            "classes": f"{folder}/classes.json",
            "hold_out": {"fraction": 0.3, "seed": 4},
        },
        "method": {"name": "none"},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 2, "global_batch_samples": 4},
        "evaluation": {"suite": suite},
        "logging": {"every_steps": 1, "strength_every_steps": 1, "tensorboard": False},
        "checkpoint": {"final": False},
    }


def grid_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """FT and DiGraP, two learning rates, two μ, three seeds."""
    return {
        "out": f"{folder}/out",
        "base": base_of(folder),
        "seeds": [0, 1, 2],
        "budget": 4,
        "shared_search": {"optimizer.learning_rate": [1e-3, 1e-2]},
        "methods": {
            "FT": {"method": {"name": "none"}},
            "DiGraP": {"method": {"name": "digrap"}, "search": {"method.strength_lr": [0.01, 0.1]}},
        },
        **changes,
    }


def write_grid(folder: Path, grid: dict[str, Any]) -> str:
    (folder / "grid.yaml").write_text(dump(grid))
    return str(folder / "grid.yaml")


def write_data(folder: Path) -> None:
    """The shards and the model of ``base_of``."""
    for number, (name, count) in enumerate((("train", 40), ("test", 8), ("sketch", 8), ("photo", 8))):
        write_shards(make_samples(count, start=100 * number), folder, prefix=name, samples_per_shard=20)
    (folder / "classes.json").write_text(json.dumps(["class 0", "class 1"]))
    save_vit(folder / "model", classes=2)


def result_of(tenths: Sequence[int]) -> SuiteResult:
    return SuiteResult(
        {
            name: SetResult(shift, number / 1000, 0.01, 100, {})  # type: ignore[arg-type]
            for (name, shift), number in zip(SHIFTS.items(), tenths, strict=True)
        }
    )


class MadeUp:
    """Stands in for ``run_trials``: writes what a run of ``numbers`` would have left.

    Attributes:
        ran: the trials that it was asked for.
    """

    def __init__(self, numbers: Numbers, fails: Callable[[Trial], bool] = lambda _: False) -> None:
        self.numbers, self.fails, self.ran = numbers, fails, []  # type: ignore[var-annotated]

    def __call__(self, trials: Sequence[Trial], *_: Any) -> dict[Trial, str]:
        failed = {}
        for trial in trials:
            self.ran.append(trial)
            if self.fails(trial):
                failed[trial] = "exit 1: made up"
                continue
            folder = trial.folder / "run"
            rows = [ReportRow(f"row {i}", result_of(tenths)) for i, tenths in enumerate(self.numbers(trial))]
            place = folder if trial.verb == "train" else folder / "evaluation"
            place.mkdir(parents=True)
            (place / "results.json").write_text(to_json(rows, []))
            (folder / "status.json").write_text('{"state": "done"}')
            if trial.verb == "train":
                self._layers(folder)
                self._metrics(folder, 0.25 if trial.method == "DiGraP" else 0.125)
        return failed

    @staticmethod
    def _metrics(folder: Path, optimizer_s: float) -> None:
        """The first step is slow; then data, forward and backward take a quarter of a second each."""
        parts = {"data": 0.25, "forward": 0.25, "backward": 0.25}
        lines = [
            {
                "step": step,
                "seconds": {**parts, "optimizer": optimizer_s + 9 * (step == 1)},
                "peak_memory_bytes": 2**20 * step,
            }
            for step in (1, 2, 4)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    @staticmethod
    def _layers(folder: Path) -> None:
        names = ["stem.weight", "layers.0.weight", "layers.1.weight"]
        rows = [encode_layers(step, 2, [0.5, 1.0, 0.0], [0.1 * step, 0.2, 0.3]) for step in (2, 4)]
        (folder / "layers.jsonl").write_text(encode_names(names) + "".join(rows))
        (folder / STRENGTH_FILE).parent.mkdir()
        strengths = [encode_row(step, [0.1, 0.2, 0.3]) for step in (2, 4)]
        (folder / STRENGTH_FILE).write_text(encode_names(names) + "".join(strengths))


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Callable[..., MadeUp]:
    """Put made-up runs in the place of real ones; nothing is drawn unless asked for, which takes most of a test's time."""
    draw = run.draw

    def use(numbers: Numbers, fails: Callable[[Trial], bool] = lambda _: False, pictures: bool = False) -> MadeUp:
        made = MadeUp(numbers, fails)
        monkeypatch.setattr("digrap_scale.compare.run.draw", draw if pictures else lambda _: {})
        monkeypatch.setattr("digrap_scale.compare.run.run_trials", made)
        return made

    return use
