"""PCGrad (Yu et al. 2020, arXiv 2001.06782) against ½‖θ − θ₀‖²: DiGraP with ω = 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from digrap_scale.method import statistics as S
from digrap_scale.method.base import Method


class PCGrad(Method):
    """g̃ = g − (⟨g, d⟩ / ‖d‖²) · d where ⟨g, d⟩ < 0, else g; d = θ − θ₀."""

    name = "pcgrad"
    uses_reference = True

    def prepare(self, projected_L: torch.Tensor, names: Sequence[str] = ()) -> None:
        super().prepare(projected_L, names)
        self.conflict_L = torch.zeros_like(projected_L)
        self.coefficient_L = torch.zeros(len(projected_L), dtype=torch.float64)

    def update(self, stats_LK: torch.Tensor, lr_L: torch.Tensor) -> None:
        inner_L, sq_L = stats_LK[:, S.GRAD_DISPLACEMENT], stats_LK[:, S.DISPLACEMENT_SQ]
        self.conflict_L = (inner_L < 0) & (sq_L > 0) & self.projected_L
        self.coefficient_L = torch.where(self.conflict_L, inner_L / sq_L, torch.zeros_like(inner_L))

    def factors(self) -> torch.Tensor:
        return -self.coefficient_L

    def conflict(self) -> torch.Tensor:
        return self.conflict_L

    def strength(self) -> torch.Tensor:
        return self.projected_L.float()
