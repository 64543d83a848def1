"""L2-SP (Li et al. 2018, arXiv 1802.01483): a pull towards the pre-trained weights in every gradient."""

from __future__ import annotations

import torch

from digrap_scale.method import statistics as S
from digrap_scale.method.base import Method


class L2SP(Method):
    """g̃ = g + λ(θ − θ₀).

    Args:
        weight: λ ≥ 0.

    Raises:
        ValueError: λ is negative.
    """

    name = "l2sp"
    uses_reference = True

    def __init__(self, weight: float) -> None:
        if not weight >= 0:
            raise ValueError(f"weight must not be negative, found {weight}")
        self.weight = weight

    def update(self, stats_LK: torch.Tensor, lr_L: torch.Tensor) -> None:
        # A layer that the loss does not reach has gradient None under FSDP2 and zeros under ZeRO-3: left alone in both.
        reached_L = (stats_LK[:, S.GRAD_SQ] > 0) & self.projected_L
        self.factor_L = torch.where(reached_L, self.weight, 0.0).double()

    def factors(self) -> torch.Tensor:
        return self.factor_L
