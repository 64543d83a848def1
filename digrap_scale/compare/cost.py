"""What a step of each method took: from the metrics that its runs logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from digrap_scale.compare.grid import Trial
from digrap_scale.errors import ConfigError
from digrap_scale.training.log import METRICS_FILE, read_metrics

CAPTION = (
    "Medians over logged steps (without a run's first), then over runs, on rank 0. `optimizer` holds the projection. Trials that "
    "ran beside each other shared the machine. For the pictures every trial measures its layers' conflicts and drift, plain "
    "fine-tuning too: against a run without, a method adds that pass as well."
)


@dataclass(frozen=True)
class Cost:
    """A method's step.

    Attributes:
        step_s: seconds of a whole step: data, forward, backward, optimizer.
        optimizer_s: seconds of the optimizer's step, with the method in it.
        peak_bytes: the largest peak of memory among its runs; None where it was not measured.
    """

    step_s: float
    optimizer_s: float
    peak_bytes: int | None


def costs_of(trials: Mapping[str, Sequence[Trial]]) -> dict[str, Cost]:
    """Method → its cost, from its finished trials; a method whose runs logged no step but the first has none.

    Raises:
        ConfigError: a run's metrics cannot be read.
    """
    found = {}
    for method, runs in trials.items():
        costs = [_of_run(trial.folder / "run") for trial in runs]
        known = [cost for cost in costs if cost is not None]
        if known:
            peaks = [cost.peak_bytes for cost in known if cost.peak_bytes is not None]
            found[method] = Cost(
                median(cost.step_s for cost in known),
                median(cost.optimizer_s for cost in known),
                max(peaks, default=None),
            )
    return found


def _of_run(folder: Path) -> Cost | None:
    lines = [line for line in read_metrics(folder) if line.get("step") != 1 and "seconds" in line]
    if not lines:
        return None
    try:
        return Cost(
            median(sum(line["seconds"].values()) for line in lines),
            median(line["seconds"]["optimizer"] for line in lines),
            max(
                (line["peak_memory_bytes"] for line in lines if line.get("peak_memory_bytes") is not None), default=None
            ),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{folder / METRICS_FILE}: expected a run's metrics, found {error!r}; delete the trial's folder"
        ) from None


def cells_of(costs: Mapping[str, Cost], baseline: str) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table that shows them, as text; steps also as multiples of the baseline's."""
    head = ["method", "step, ms", f"step / {baseline}", "optimizer, ms", "peak memory, MiB"]
    base = costs.get(baseline)
    lines = []
    for name, cost in costs.items():
        ratio = f"{cost.step_s / base.step_s:.2f}" if base is not None else "–"
        peak = "–" if cost.peak_bytes is None else f"{cost.peak_bytes / 2**20:.0f}"
        lines.append([name, f"{1000 * cost.step_s:.0f}", ratio, f"{1000 * cost.optimizer_s:.1f}", peak])
    return head, lines
