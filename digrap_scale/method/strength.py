"""ω, the strength of the projection: one number a layer, with an Adam of its own (METHOD §1).

All of it is [L] float32 on the CPU, computed in float64 and rounded once, so that every rank that is given the same
reduced statistics holds the same bits, and a saved state continues exactly.
"""

from __future__ import annotations

from typing import Any

import torch

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class Strength:
    """ω ← clip(Adam(ω, h), 0, 1) for L layers; or ω = ``fixed`` for all time."""

    def __init__(self, layers: int, lr: float, fixed: float | None = None) -> None:
        if not lr > 0:
            raise ValueError(f"strength_lr must be positive, found {lr}")
        if fixed is not None and not 0 <= fixed <= 1:
            raise ValueError(f"fixed_strength must be from 0 to 1, found {fixed}")
        self.lr = lr
        self.fixed = fixed
        self.step = 0
        self.value_L = torch.zeros(layers) if fixed is None else torch.full((layers,), float(fixed))
        self.first_moment_L = torch.zeros(layers)
        self.second_moment_L = torch.zeros(layers)

    def update(self, hypergradient_L: torch.Tensor, mask_L: torch.Tensor) -> None:
        """One Adam step on ω (β = 0.9, 0.999; ε = 1e-8), clipped to [0, 1].

        Args:
            hypergradient_L: [L] float64, normalised ∂L/∂ω.
            mask_L: [L] bool, the layers that have a reference; the others keep ω = 0.
        """
        self.step += 1
        gradient_L = torch.where(mask_L, hypergradient_L, torch.zeros_like(hypergradient_L)).double()
        first_L = self.first_moment_L.double().mul(BETA1).add(gradient_L, alpha=1 - BETA1)
        second_L = self.second_moment_L.double().mul(BETA2).add(gradient_L.square(), alpha=1 - BETA2)
        self.first_moment_L, self.second_moment_L = first_L.float(), second_L.float()
        first_hat_L = first_L / (1 - BETA1**self.step)
        second_hat_L = second_L / (1 - BETA2**self.step)
        value_L = self.value_L.double() - self.lr * first_hat_L / (second_hat_L.sqrt() + EPS)
        self.value_L = value_L.clamp(0, 1).float()

    def state(self) -> dict[str, Any]:
        """Per-layer float32 tensors [L] and the step count."""
        return {
            "strength": self.value_L.clone(),
            "first_moment": self.first_moment_L.clone(),
            "second_moment": self.second_moment_L.clone(),
            "strength_step": self.step,
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of ``state``."""
        self.value_L = state["strength"].clone()
        self.first_moment_L = state["first_moment"].clone()
        self.second_moment_L = state["second_moment"].clone()
        self.step = int(state["strength_step"])


def normalize(hypergradient_L: torch.Tensor, counted_L: torch.Tensor | None = None) -> torch.Tensor:
    """h divided by its L2 norm over layers; 0 stays 0. The paper names ``Normalize`` without a formula: this is our reading.

    ``counted_L`` [L] bool: the layers that the norm is taken of, one of each group.
    """
    norm = torch.linalg.vector_norm(hypergradient_L if counted_L is None else hypergradient_L[counted_L])
    return hypergradient_L / norm if norm > 0 else hypergradient_L
