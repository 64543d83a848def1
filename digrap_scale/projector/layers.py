"""What happened to each layer between two snapshots: how often it was in conflict, and how far it has drifted.

Both come from the statistics that a step reduces anyway: nothing more is computed or sent.
"""

# L layers, K statistics

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from digrap_scale.method import statistics as S


@dataclass(frozen=True)
class LayerSnapshot:
    """The layers that have a reference, since the snapshot before (or since this process began).

    Attributes:
        names: [L] parameter names.
        steps: steps that were counted; skipped ones are not.
        conflict_rate: [L] share of them with ⟨g, θ − θ₀⟩ < 0, of each tensor by itself, whatever the method groups.
        drift: [L] ‖θ − θ₀‖ before the last of them.
    """

    names: list[str]
    steps: int
    conflict_rate: list[float]
    drift: list[float]


class LayerCounts:
    """Counts the layers' conflicts; the same on every rank.

    Args:
        names: of all layers.
        projected_L: [L] bool, which of them have a reference.
    """

    def __init__(self, names: Sequence[str], projected_L: torch.Tensor) -> None:
        self._shown = projected_L.nonzero().flatten()
        self._names = [names[layer] for layer in self._shown.tolist()]
        self._conflicts = torch.zeros(len(self._shown), dtype=torch.int64)
        self._drift = torch.zeros(len(self._shown), dtype=torch.float64)
        self._steps = 0

    def note(self, stats_LK: torch.Tensor) -> None:
        """A step's reduced statistics, [L, 4] float64 on the CPU."""
        self._conflicts += stats_LK[self._shown, S.GRAD_DISPLACEMENT] < 0
        self._drift = stats_LK[self._shown, S.DISPLACEMENT_SQ].clamp(min=0).sqrt()
        self._steps += 1

    def take(self) -> LayerSnapshot | None:
        """The snapshot, after which counting starts anew; None where there is nothing to tell."""
        if not self._steps or not self._names:
            return None
        rates = (self._conflicts / self._steps).tolist()
        snapshot = LayerSnapshot(self._names, self._steps, rates, self._drift.tolist())
        self._conflicts.zero_()
        self._steps = 0
        return snapshot
