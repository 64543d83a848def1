"""SPD, selective projection decay (Tian et al. 2024, arXiv 2411.01713)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from digrap_scale.method import statistics as S
from digrap_scale.method.base import Method, add_displacement_
from digrap_scale.types import ShardView


class SPD(Method):
    """After the base update, where ⟨g, d⟩ > 0 with d = θ_{t-1} − θ₀: θ ← θ − λ · r · (θ − θ₀),
    r = clip((‖θ_new − θ₀‖ − ‖d‖) / ‖θ_new − θ₀‖, 0, 1).

    Args:
        weight: λ ≥ 0.

    Raises:
        ValueError: λ is negative.
    """

    name = "spd"
    uses_reference = True
    needs_previous = True  # θ_{t-1}, to tell the update
    acts_on_update = True

    def __init__(self, weight: float) -> None:
        if not weight >= 0:
            raise ValueError(f"weight must not be negative, found {weight}")
        self.weight = weight

    def prepare(self, projected_L: torch.Tensor, names: Sequence[str] = ()) -> None:
        super().prepare(projected_L, names)
        self.stats_LK = torch.zeros(len(projected_L), S.GRADIENT_STATISTICS, dtype=torch.float64)

    def update(self, stats_LK: torch.Tensor, lr_L: torch.Tensor) -> None:
        self.stats_LK = stats_LK.clone()

    def apply_update_(self, views: Sequence[ShardView], layers: Sequence[int], stats_LK: torch.Tensor) -> None:
        before_LK = self.stats_LK[list(layers)]
        selected_L = (before_LK[:, S.GRAD_DISPLACEMENT] > 0) & self.projected_L[list(layers)]
        sq_L = before_LK[:, S.DISPLACEMENT_SQ]
        new_sq_L = (sq_L + 2 * stats_LK[:, S.UPDATE_DISPLACEMENT] + stats_LK[:, S.UPDATE_SQ]).clamp(min=0)
        ratio_L = torch.where(new_sq_L > 0, 1 - (sq_L / new_sq_L).sqrt(), torch.zeros_like(sq_L)).clamp(0, 1)
        decay_L = torch.where(selected_L, self.weight * ratio_L, torch.zeros_like(ratio_L))
        add_displacement_(views, (-decay_L).tolist(), "weight", self.kernels)
