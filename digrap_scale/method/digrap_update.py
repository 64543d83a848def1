"""Our variant of DiGraP: project what the optimizer did, not the gradient it was given (METHOD, "Our variant").

Under Adam a projected gradient is preconditioned afterwards, which undoes most of the projection; this form acts on the
optimizer's whole step u = θ_new − θ_{t-1} and so does not depend on the optimizer. Shapes: L layers, K statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from digrap_scale.method import statistics as S
from digrap_scale.method.base import Method, add_displacement_
from digrap_scale.method.strength import Strength, normalize
from digrap_scale.types import ShardView


class DiGraPUpdate(Method):
    """θ_t = θ_new − ω · a · d where a > 0, with a = ⟨u, d⟩ / ‖d‖² and d = θ_{t-1} − θ₀.

    ω is learned from h_t = −⟨g_t, a_{t-1} · d_{t-1}⟩ of the layers projected at t−1 (0 elsewhere), divided by its L2
    norm over layers.

    Args:
        strength_lr: μ, ω's learning rate.
        fixed_strength: ω for all time, from the first step on, in place of learning it.
    """

    name = "digrap_update"
    uses_reference = True
    needs_previous = True
    has_strength = True
    acts_on_update = True

    def __init__(self, strength_lr: float = 1e-2, fixed_strength: float | None = None) -> None:
        self.omega = Strength(0, strength_lr, fixed_strength)

    def prepare(self, projected_L: torch.Tensor, names: Sequence[str] = ()) -> None:
        super().prepare(projected_L, names)
        layers = len(projected_L)
        self.omega = Strength(layers, self.omega.lr, self.omega.fixed)
        self.steps = 0
        self.displacement_sq_L = torch.zeros(layers, dtype=torch.float64)
        # max(a_{t-1}, 0): 0 where the last step was not projected.
        self.coefficient_L = torch.zeros(layers, dtype=torch.float64)

    def update(self, stats_LK: torch.Tensor, lr_L: torch.Tensor) -> None:
        if self.steps > 0 and self.omega.fixed is None:
            self.omega.update(normalize(-self.coefficient_L * stats_LK[:, S.GRAD_PREVIOUS]), self.projected_L)
        self.steps += 1
        self.displacement_sq_L = stats_LK[:, S.DISPLACEMENT_SQ].clone()
        # Filled by apply_update_; a layer whose update is never seen counts as not projected.
        self.coefficient_L = torch.zeros_like(self.coefficient_L)

    def apply_update_(self, views: Sequence[ShardView], layers: Sequence[int], stats_LK: torch.Tensor) -> None:
        rows = list(layers)
        sq_L = self.displacement_sq_L[rows]
        away_L = (stats_LK[:, S.UPDATE_DISPLACEMENT] > 0) & (sq_L > 0) & self.projected_L[rows]
        a_L = torch.where(away_L, stats_LK[:, S.UPDATE_DISPLACEMENT] / sq_L, torch.zeros_like(sq_L))
        self.coefficient_L[rows] = a_L
        add_displacement_(
            views, (-self.strength()[rows].double() * a_L).tolist(), "weight", self.kernels, of="previous"
        )

    def conflict(self) -> torch.Tensor:
        return self.coefficient_L > 0

    def strength(self) -> torch.Tensor:
        return self.omega.value_L

    def state(self) -> dict[str, Any]:
        return {**self.omega.state(), "steps": self.steps, "coefficient": self.coefficient_L.clone()}

    def load(self, state: dict[str, Any]) -> None:
        self.omega.load(state)
        self.steps = int(state["steps"])
        self.coefficient_L = state["coefficient"].double().clone()
