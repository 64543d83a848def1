"""FTP, fast trainable projection (Tian et al. 2023, arXiv 2310.19182): each row of each tensor stays within a learned
distance of its pre-trained values. Shapes: L layers, R ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from digrap_scale.method import statistics as S
from digrap_scale.method.base import RowMethod
from digrap_scale.method.kernels import displacement
from digrap_scale.method.rows import RowSums
from digrap_scale.types import ShardSpec, ShardView

GAMMA_LR, BETA1, BETA2, EPS = 1e-2, 0.9, 0.999, 1e-8
SMALLEST = 1e-8  # γ starts here, and never goes below


class FTP(RowMethod):
    """After the base update, with c = θ_new − θ₀ and n = ‖c‖ + 1e-8, the L1 norm of each row ("MARS" norm):
    θ ← θ₀ + min(γ/n, 1) · c.

    One γ a tensor, learned by an Adam of its own (rate 1e-2, β = 0.9, 0.999) from Σ ⟨g_t, c_{t-1}/n_{t-1}⟩ over rows, whose
    positive values are multiplied by κ; then clipped to [1e-8, the largest n]. Its first step is the second one, with that
    step's bias correction. Rows follow dim 0; a tensor of one dimension (a bias, a norm's gain) is one row in all: both are
    what the published code does. As γ starts at 1e-8, the first step puts weights back to θ₀.

    c/n is kept, one more shard in the weights' dtype. A tensor whose gradient was 0 in all steps so far is left alone.

    Args:
        annealing: κ in [0, 1]; 1 lets γ shrink as fast as it grows, 0 not at all.

    Raises:
        ValueError: κ is out of its range.
    """

    name = "ftp"
    uses_reference = True
    needs_previous = True
    keeps_directions = True
    returns_to_reference = True

    def __init__(self, annealing: float = 1.0) -> None:
        if not 0 <= annealing <= 1:
            raise ValueError(f"annealing must be from 0 to 1, found {annealing}")
        self.annealing = annealing

    def prepare(self, projected_L: torch.Tensor, names: Sequence[str] = ()) -> None:
        super().prepare(projected_L, names)
        layers = len(projected_L)
        self.steps = 0
        self.gamma_L = torch.full((layers,), SMALLEST, dtype=torch.float64)
        self.first_moment_L = torch.zeros(layers, dtype=torch.float64)
        self.second_moment_L = torch.zeros(layers, dtype=torch.float64)
        self.reached_L = torch.zeros(layers, dtype=torch.bool)

    def statistics(self, views: Sequence[ShardView]) -> torch.Tensor:
        # ``previous`` holds c/n, not weights: without a reference, ⟨g, d_{t-1}⟩'s column is ⟨g, c/n⟩. The other inner
        # products are then those of θ itself, and nothing looks at them.
        views = [replace(view, reference=None) for view in views]
        return S.gradient_statistics(views, self.kernels, with_previous=True)

    def update(self, stats_LK: torch.Tensor, lr_L: torch.Tensor) -> None:
        self.steps += 1
        self.reached_L |= (stats_LK[:, S.GRAD_SQ] > 0) & self.projected_L
        if self.steps == 1:
            return
        h_L = stats_LK[:, S.GRAD_PREVIOUS]
        h_L = torch.where(h_L > 0, self.annealing * h_L, h_L)
        self.first_moment_L = BETA1 * self.first_moment_L + (1 - BETA1) * h_L
        self.second_moment_L = BETA2 * self.second_moment_L + (1 - BETA2) * h_L.square()
        first_L = self.first_moment_L / (1 - BETA1**self.steps)
        second_L = self.second_moment_L / (1 - BETA2**self.steps)
        self.gamma_L = self.gamma_L - GAMMA_LR * first_L / (second_L.sqrt() + EPS)

    def begin_rows(self, specs: Sequence[ShardSpec], layers: Sequence[int], device: torch.device) -> None:
        self._row = {layer: number for number, layer in enumerate(layers)}
        self._layers = list(layers)
        self._norms = RowSums(specs, device)

    def measure_rows(self, views: Sequence[ShardView], layers: Sequence[int]) -> None:
        for layer, view in zip(layers, views, strict=True):
            for part, rows in self._segments(layer, view):
                c = displacement(view.weight[part], _of(view.reference, part, view.weight.device))
                norms = torch.linalg.vector_norm(c.view(rows.stop - rows.start, -1), ord=1, dim=1)
                self._norms.sums[rows] += norms.double()

    def edges(self) -> torch.Tensor:
        return self._norms.edges()

    def join_rows(self, edges_RLK: torch.Tensor) -> torch.Tensor:
        largest_L = self._norms.join(edges_RLK)
        self.gamma_L[self._layers] = torch.minimum(self.gamma_L[self._layers].clamp(min=SMALLEST), largest_L + EPS)
        self._ratios = (self._spread_gamma() / (self._norms.sums + EPS)).clamp(max=1).float()
        self._scales = (1 / (self._norms.sums + EPS)).float()
        return largest_L

    def apply_rows_(self, views: Sequence[ShardView], layers: Sequence[int]) -> None:
        """Project in place, and keep c/n in ``view.previous``."""
        for layer, view in zip(layers, views, strict=True):
            for part, rows in self._segments(layer, view):
                weight, reference = view.weight[part], _of(view.reference, part, view.weight.device)
                shape = (rows.stop - rows.start, -1)
                ratios, scales = self._ratios[rows].unsqueeze(1), self._scales[rows].unsqueeze(1)
                new = weight.float().view(shape)
                start = torch.zeros_like(new) if reference is None else reference.float().view(shape)
                assert view.previous is not None, f"{view.spec.name}: nothing was kept for its directions"
                view.previous[part] = ((new - start) * scales).view(-1).to(view.previous.dtype)
                weight.copy_(torch.lerp(start, new, ratios).view(-1))  # exact at both ends

    def _segments(self, layer: int, view: ShardView) -> Any:
        if not (view.projected and bool(self.reached_L[layer])):
            return ()
        return self._norms.segments(self._row[layer], view)

    def _spread_gamma(self) -> torch.Tensor:
        """γ of the layer of each row."""
        return self._norms.spread(self.gamma_L[self._layers])

    def state(self) -> dict[str, Any]:
        return {
            "gamma": self.gamma_L.clone(),
            "first_moment": self.first_moment_L.clone(),
            "second_moment": self.second_moment_L.clone(),
            "reached": self.reached_L.clone(),
            "steps": self.steps,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.gamma_L = state["gamma"].double().clone()
        self.first_moment_L = state["first_moment"].double().clone()
        self.second_moment_L = state["second_moment"].double().clone()
        self.reached_L = state["reached"].bool().clone()
        self.steps = int(state["steps"])


def _of(reference: torch.Tensor | None, part: slice, device: torch.device) -> torch.Tensor | None:
    return None if reference is None else reference[part].to(device, non_blocking=True)
