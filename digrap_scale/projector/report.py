"""What a step looked like."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class StepReport:
    """What the last optimizer step looked like.

    Attributes:
        step: how many steps the projector has seen, skipped ones included.
        grad_norm: global L2 norm of the gradient, before clipping and projection.
        conflict_rate: share of the layers with a reference that were in conflict.
        strength_mean: mean ω of the layers with a reference.
        skipped: the gradient was not finite, so weights, moments and ω are untouched.
        nonfinite_layers: the layers whose gradient was not finite.
    """

    step: int = 0
    grad_norm: float = 0.0
    conflict_rate: float = 0.0
    strength_mean: float = 0.0
    skipped: bool = False
    nonfinite_layers: list[str] = field(default_factory=list)
