"""What a method is: reduced statistics in, per-layer numbers out, shards changed in place. It knows no process group.

Shapes: L layers, K statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from digrap_scale.method import statistics as S
from digrap_scale.method.kernels import Kernels, device_rows, displacement, send
from digrap_scale.method.native import KINDS, NativeKernels
from digrap_scale.types import ShardSpec, ShardView


class Method:
    """A fine-tuning method, as the projector drives it; the base class itself is plain fine-tuning.

    In the optimizer's pre hook: ``statistics`` → (reduced over ranks) → ``update`` → g̃ = clip · g + ``factors`` · d.
    In its post hook, where ``acts_on_update``: ``update_statistics`` → (reduced) → ``apply_update_``.

    Attributes:
        name: the config's word for it.
        uses_reference: whether it looks at pre-trained weights at all.
        needs_previous: whether ``view.previous``, the weights before the last optimizer step, must be kept.
        keeps_directions: whether ``view.previous`` is not those, but what the method itself writes there.
        returns_to_reference: whether a step may put weights back to the reference: zeros would be the end of learning.
        has_strength: whether ω means something for it.
        acts_on_update: whether it has something to do after the optimizer's step.
        rests_layers: whether there are steps in which it leaves some layers alone (see ``resting``).
        kernels: how large layers are walked; set by whoever drives the method.
    """

    name = "none"
    uses_reference = False
    needs_previous = False
    keeps_directions = False
    returns_to_reference = False
    has_strength = False
    acts_on_update = False
    rests_layers = False
    kernels: Kernels = Kernels()

    def prepare(self, projected_L: torch.Tensor, names: Sequence[str] = ()) -> None:
        """Called once: ``projected_L`` [L] bool tells which layers have a reference, ``names`` how they are called."""
        self.projected_L = projected_L

    def begin_step(self, step: int) -> bool:
        """Called before everything else of step ``step`` (1 is the first; a skipped one may be left out). Returns whether the
        optimizer is to start anew: its moments and counts of steps become 0."""
        return False

    def resting(self) -> torch.Tensor:
        """[L] bool: the layers that do not train in the step under way: neither weights nor optimizer state change."""
        return torch.zeros_like(self.projected_L)

    def statistics(self, views: Sequence[ShardView]) -> torch.Tensor:
        """Local gradient statistics [L, 4] float64 on the shards' device; the backend then sums them over ranks."""
        return S.gradient_statistics(views, self.kernels, with_previous=self.needs_previous)

    def update(self, stats_LK: torch.Tensor, lr_L: torch.Tensor) -> None:
        """Take the reduced statistics of a finite step (CPU float64 [L, 4], of the clipped gradient) and the layers'
        learning rates ([L] float64)."""

    def factors(self) -> torch.Tensor:
        """[L] float64: what the step under way adds to each gradient, in units of its displacement d = θ − θ₀."""
        return torch.zeros(len(self.projected_L), dtype=torch.float64)

    def apply_(self, views: Sequence[ShardView], layers: Sequence[int], clip: float) -> None:
        """g ← clip · g + factor · d in place; ``views`` are (parts of) the rows ``layers``."""
        add_displacement_(views, self.factors()[list(layers)].tolist(), "grad", self.kernels, scale=clip)

    def update_statistics(self, views: Sequence[ShardView]) -> torch.Tensor:
        """Local statistics [L, 2] float64 of the optimizer's update, for methods that act on it."""
        return S.update_statistics(views, self.kernels)

    def apply_update_(self, views: Sequence[ShardView], layers: Sequence[int], stats_LK: torch.Tensor) -> None:
        """Change the new weights in place, from the reduced update statistics (CPU float64, a row a view)."""

    def conflict(self) -> torch.Tensor:
        """[L] bool: layers that were in conflict in the last step."""
        return torch.zeros_like(self.projected_L)

    def strength(self) -> torch.Tensor:
        """[L] float32: ω of every layer (0 where the method has none)."""
        return torch.zeros(len(self.projected_L))

    def state(self) -> dict[str, Any]:
        """State that must survive: [L] tensors and plain numbers."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of ``state``."""


class RowMethod(Method):
    """A method that looks at whole rows of the new weights, which shards may cut. After the optimizer's step, for the layers
    under way: ``begin_rows``, ``measure_rows`` of every part, one exchange of ``edges``, ``join_rows``, ``apply_rows_`` to
    every part. Shapes: L layers under way, R ranks, K statistics.
    """

    acts_on_update = True

    def begin_rows(self, specs: Sequence[ShardSpec], layers: Sequence[int], device: torch.device) -> None:
        """The step under way changes ``layers``, of which this rank holds ``specs``."""
        raise NotImplementedError

    def measure_rows(self, views: Sequence[ShardView], layers: Sequence[int]) -> None:
        """Add the parts ``views`` of the new weights to the row norms of the layers that they are of."""
        raise NotImplementedError

    def edges(self) -> torch.Tensor:
        """This rank's share of the cut rows, and its largest norms: [L, K] float64, for all ranks to see."""
        raise NotImplementedError

    def join_rows(self, edges_RLK: torch.Tensor) -> torch.Tensor:
        """Take all ranks' ``edges`` (CPU); the largest row norm of each layer under way, [L] float64."""
        raise NotImplementedError

    def apply_rows_(self, views: Sequence[ShardView], layers: Sequence[int]) -> None:
        """Change the parts ``views`` in place."""
        raise NotImplementedError


def add_displacement_(
    views: Sequence[ShardView],
    factors: Sequence[float],
    target: str,
    kernels: Kernels,
    of: str = "weight",
    scale: float = 1.0,
) -> None:
    """x ← scale · x + factor · (θ − θ₀) in place, one pass over memory.

    Args:
        views: shards to change.
        factors: one a view; 0 leaves a view's direction alone.
        target: what x is, ``"grad"`` or ``"weight"``.
        kernels: how large layers are walked.
        of: which θ is meant, ``"weight"`` (the present one) or ``"previous"`` (before the optimizer's step).
        scale: factor of x itself.
    """
    active: list[ShardView] = []
    active_factors: list[float] = []
    for view, factor in zip(views, factors, strict=True):
        if getattr(view, target) is None:
            continue
        if factor == 0.0 or not view.projected:
            if scale != 1.0:
                getattr(view, target).mul_(scale)
            continue
        active.append(view)
        active_factors.append(factor)
    if isinstance(kernels, NativeKernels) and all(getattr(view, target).dtype in KINDS for view in active):
        kernels.add_displacements_(
            [getattr(view, target) for view in active],
            [getattr(view, of) for view in active],
            [view.reference for view in active],
            active_factors,
            scale,
        )
        return
    large, packs = S.pack_small(active)
    on_device = device_rows([(active_factors[row], scale) for row in large], views[0].weight.device) if large else []
    for row, factors_2 in zip(large, on_device, strict=True):
        view = active[row]
        x, theta = getattr(view, target), getattr(view, of)
        kernels.add_displacement_(x, theta, view.reference, active_factors[row], scale, factors_2)
    for pack in packs:
        theta = pack.gather(of)
        assert theta is not None, f"{of} is needed for {pack.views[0].spec.name}"
        d = displacement(theta, pack.gather("reference"))
        targets = [getattr(view, target) for view in pack.views]
        if all(tensor.dtype == torch.float32 for tensor in targets):
            # The multi-tensor form that torch's own optimizers step with: one launch for the pack, not one a layer.
            if scale != 1.0:
                torch._foreach_mul_(targets, scale)
            here = send(torch.tensor([active_factors[row] for row in pack.layers], dtype=torch.float32), d.device)
            torch._foreach_add_(targets, pack.pieces(d.mul_(pack.spread(here))))
            continue
        for tensor, piece, row in zip(targets, pack.pieces(d), pack.layers, strict=True):
            # The sum is taken in float32 and rounded once where the target is narrower.
            exact = tensor if tensor.dtype == torch.float32 else tensor.float()
            if scale != 1.0:
                exact.mul_(scale)
            exact.add_(piece, alpha=active_factors[row])
            if exact is not tensor:
                tensor.copy_(exact)
