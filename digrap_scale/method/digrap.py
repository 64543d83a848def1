"""DiGraP, Algorithm 1 of Huang et al. (ICLR 2025, arXiv 2502.15895): project the gradient, layer by layer.

Shapes: L layers, K statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from digrap_scale.method import statistics as S
from digrap_scale.method.base import Method
from digrap_scale.method.grouping import BLOCK_PATTERN, GROUPINGS, Grouping
from digrap_scale.method.strength import Strength, normalize

NORMALIZATIONS = ("layers", "cosine", "none")
HYPERGRADIENTS = ("all", "conflicts")


class DiGraP(Method):
    """g̃ = g − ω · c · d where ⟨g, d⟩ < 0, else g; with d = θ − θ₀ and c = ⟨g, d⟩ / ‖d‖².

    ω is learned per layer from h_t = α_{t-1} · ⟨g_t, c_{t-1} · d_{t-1}⟩ by an Adam of its own.

    Args:
        strength_lr: μ, ω's learning rate (the paper: 1e-3 … 1e-1).
        normalization: ``layers`` (h over its L2 norm over layers), ``cosine`` (h / (α‖g‖‖p_{t-1}‖), each layer
            by itself) or ``none``. The paper names the operation without a formula; ``layers`` is our reading.
        hypergradient: ``all`` (the algorithm to the letter) or ``conflicts`` (0 for layers not projected at t−1).
        grouping: what shares an ω, and is projected as one vector: each ``tensor`` (the paper's layer), the tensors of a
            ``module``, or of a ``block``: those whose names have the same match of ``block_pattern``.
        block_pattern: regex; by default a name up to its first number.
        fixed_strength: ω for all time, from the first step on, in place of learning it.

    Raises:
        ValueError: an argument is out of its range.
    """

    name = "digrap"
    uses_reference = True
    needs_previous = True
    has_strength = True

    def __init__(
        self,
        strength_lr: float = 1e-2,
        normalization: str = "layers",
        hypergradient: str = "all",
        grouping: str = "tensor",
        block_pattern: str = BLOCK_PATTERN,
        fixed_strength: float | None = None,
    ) -> None:
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {NORMALIZATIONS}, found {normalization!r}")
        if hypergradient not in HYPERGRADIENTS:
            raise ValueError(f"hypergradient must be one of {HYPERGRADIENTS}, found {hypergradient!r}")
        if grouping not in GROUPINGS:
            raise ValueError(f"grouping must be one of {GROUPINGS}, found {grouping!r}")
        self.normalization = normalization
        self.hypergradient = hypergradient
        self.grouping = grouping
        self.block_pattern = block_pattern
        self.needs_previous = fixed_strength is None  # nothing looks back where nothing is learned
        self.omega = Strength(0, strength_lr, fixed_strength)

    def prepare(self, projected_L: torch.Tensor, names: Sequence[str] = ()) -> None:
        super().prepare(projected_L, names)
        layers = len(projected_L)
        self.omega = Strength(layers, self.omega.lr, self.omega.fixed)
        self.groups = Grouping(names, projected_L, self.grouping, self.block_pattern)
        self.steps = 0
        # Of the step before: c_{t-1}, ‖d_{t-1}‖², α_{t-1} and whether the layer was in conflict.
        self.coefficient_L = torch.zeros(layers, dtype=torch.float64)
        self.displacement_sq_L = torch.zeros(layers, dtype=torch.float64)
        self.lr_L = torch.zeros(layers, dtype=torch.float64)
        self.conflict_L = torch.zeros(layers, dtype=torch.bool)

    def update(self, stats_LK: torch.Tensor, lr_L: torch.Tensor) -> None:
        if self.steps > 0 and self.omega.fixed is None:
            self.omega.update(self._hypergradient(stats_LK), self.projected_L)
        self.steps += 1
        inner_L = self.groups.sums(stats_LK[:, S.GRAD_DISPLACEMENT])
        sq_L = self.groups.sums(stats_LK[:, S.DISPLACEMENT_SQ])
        self.coefficient_L = torch.where(sq_L > 0, inner_L / sq_L, torch.zeros_like(inner_L))
        self.displacement_sq_L = sq_L.clone()
        self.conflict_L = (inner_L < 0) & (sq_L > 0) & self.projected_L
        self.lr_L = lr_L.clone()

    def _hypergradient(self, stats_LK: torch.Tensor) -> torch.Tensor:
        """h_t [L] float64, normalised; the layers of a group have the same."""
        h_L = self.coefficient_L * self.groups.sums(self.lr_L * stats_LK[:, S.GRAD_PREVIOUS])
        if self.hypergradient == "conflicts":
            h_L = torch.where(self.conflict_L, h_L, torch.zeros_like(h_L))
        if self.normalization == "layers":
            return normalize(h_L, self.groups.counted_L)
        if self.normalization == "cosine":
            grad_L = self.groups.sums(self.lr_L.square() * stats_LK[:, S.GRAD_SQ]).sqrt()
            size_L = grad_L * self.coefficient_L.abs() * self.displacement_sq_L.sqrt()
            return torch.where(size_L > 0, h_L / size_L, torch.zeros_like(h_L))
        return h_L

    def factors(self) -> torch.Tensor:
        strength_L = torch.where(self.conflict_L, self.strength().double(), torch.zeros_like(self.coefficient_L))
        return -strength_L * self.coefficient_L

    def conflict(self) -> torch.Tensor:
        return self.conflict_L

    def strength(self) -> torch.Tensor:
        return self.omega.value_L

    def state(self) -> dict[str, Any]:
        return {
            **self.omega.state(),
            "steps": self.steps,
            "coefficient": self.coefficient_L.clone(),
            "displacement_sq": self.displacement_sq_L.clone(),
            "learning_rate": self.lr_L.clone(),
            "conflict": self.conflict_L.clone(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.omega.load(state)
        self.steps = int(state["steps"])
        self.coefficient_L = state["coefficient"].double().clone()
        self.displacement_sq_L = state["displacement_sq"].double().clone()
        self.lr_L = state["learning_rate"].double().clone()
        self.conflict_L = state["conflict"].bool().clone()
