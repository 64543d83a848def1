"""How ω, conflicts and drift are spread over layers, for TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from digrap_scale.projector import Projector
from digrap_scale.projector.drift import layer_drift

if TYPE_CHECKING:
    from digrap_scale.training.log import RunLog


class LayerHistograms:
    """Counts conflicts from step to step, and shows all three every ``every_steps`` steps and at the end.

    Args:
        every_steps: None: never.
        total_steps: of the run.
    """

    def __init__(self, every_steps: int | None, total_steps: int) -> None:
        self._every_steps, self._total_steps = every_steps, total_steps
        self._steps = 0
        self._conflicts_L: torch.Tensor | None = None

    def after_step(self, step: int, projector: Projector, log: RunLog) -> None:
        """Count, and show if it is due. Collective then. Layers without a reference are left out."""
        if self._every_steps is None:
            return
        if not projector.report.skipped:
            conflict_L = projector.method.conflict().long()
            self._conflicts_L = conflict_L if self._conflicts_L is None else self._conflicts_L + conflict_L
            self._steps += 1
        if step % self._every_steps and step != self._total_steps:
            return
        drift = layer_drift(projector)
        shown = {"drift": list(drift.values())}
        if self._conflicts_L is not None:
            rates = (self._conflicts_L / self._steps).tolist()
            names = [spec.name for spec in projector.backend.specs]
            shown["conflict_rate"] = [rate for name, rate in zip(names, rates, strict=True) if name in drift]
        if projector.method.has_strength:
            shown["strength"] = list(projector.strength().values())
        log.histograms(step, {name: values for name, values in shown.items() if values})
        self._conflicts_L, self._steps = None, 0
