"""Adam's step with the projection in the same pass over memory: g̃ is never written.

Large layers go through one kernel each; small ones through torch's own functional Adam, many in a call. The rule, and the
state that it leaves, are torch's. Shapes: N local elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from digrap_scale.method.base import add_displacement_
from digrap_scale.method.kernels import AdamNumbers, Kernels, device_rows, large_from
from digrap_scale.method.native import NativeKernels
from digrap_scale.types import AdamSettings, AdamState, ShardView


def adam_(
    views: Sequence[ShardView],
    states: Sequence[AdamState | None],
    factors: Sequence[float],
    clip: float,
    kernels: Kernels,
) -> None:
    """Steps every view that has a gradient by Adam, with g̃ = clip · g + factor · (θ − θ₀).

    Args:
        views: shards or parts of them; ``weight`` changes in place. Gradients of small ones do, too.
        states: a view's moments, step count and settings; None where it has no gradient.
        factors: a view's factor; 0 leaves the gradient's direction alone.
        clip: ≤ 1, scales every gradient.
        kernels: how large layers are walked.
    """
    if isinstance(kernels, NativeKernels):
        kernels.adam_all_(
            [
                (view, state, _numbers(state, factor if view.projected else 0.0, clip))
                for view, state, factor in zip(views, states, factors, strict=True)
                if view.grad is not None and state is not None
            ]
        )
        return
    small: list[int] = []
    large: list[tuple[ShardView, AdamState, AdamNumbers]] = []
    large_elements = large_from(views[0].weight.device) if views else 0
    for row, (view, state, factor) in enumerate(zip(views, states, factors, strict=True)):
        if view.grad is None or state is None or view.weight.numel() == 0:
            continue
        if view.weight.numel() < large_elements:
            small.append(row)
            continue
        large.append((view, state, _numbers(state, factor if view.projected else 0.0, clip)))
    on_device = device_rows([numbers for _, _, numbers in large], views[0].weight.device) if large else []
    for (view, state, numbers), row_numbers in zip(large, on_device, strict=True):
        assert view.grad is not None
        reference = view.reference if numbers.factor != 0.0 else None
        kernels.adam_(view.grad, view.weight, reference, state.first, state.second, numbers, row_numbers)
    add_displacement_([views[row] for row in small], [factors[row] for row in small], "grad", kernels, scale=clip)
    together: dict[tuple[AdamSettings, int], tuple[list[ShardView], list[AdamState]]] = {}
    for row in small:
        state = states[row]
        assert state is not None
        of_kind = together.setdefault((state.settings, state.count), ([], []))
        of_kind[0].append(views[row])
        of_kind[1].append(state)
    for (settings, count), (alike, their_states) in together.items():
        _torch_adam_(alike, their_states, settings, count)


def _numbers(state: AdamState, factor: float, clip: float) -> AdamNumbers:
    s = state.settings
    return AdamNumbers(
        scale=clip,
        factor=factor,
        coupled=0.0 if s.decoupled else s.weight_decay,
        beta1=s.beta1,
        keep1=1 - s.beta1,
        beta2=s.beta2,
        keep2=1 - s.beta2,
        step_size=s.lr / (1 - s.beta1**state.count),
        second_scale=1 / math.sqrt(1 - s.beta2**state.count),
        eps=s.eps,
        decay=s.lr * s.weight_decay if s.decoupled else 0.0,
    )


def _torch_adam_(views: Sequence[ShardView], states: Sequence[AdamState], settings: AdamSettings, count: int) -> None:
    """torch's functional form counts steps in tensors, one a parameter: these are thrown away."""
    device = views[0].weight.device if settings.fused else torch.device("cpu")
    counts = list(torch.full((len(views),), count - 1, dtype=torch.float32, device=device).unbind())
    (adamw if settings.decoupled else adam)(
        [view.weight for view in views],
        [view.grad for view in views if view.grad is not None],
        [state.first for state in states],
        [state.second for state in states],
        [],
        counts,
        foreach=not settings.fused,
        fused=settings.fused,
        amsgrad=False,
        beta1=settings.beta1,
        beta2=settings.beta2,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        eps=settings.eps,
        maximize=False,
    )
