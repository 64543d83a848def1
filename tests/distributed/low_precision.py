"""Plain training of the toy in half precision with float32 masters: gradients per rank, averaged as the ranks do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any, NamedTuple

import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from tests.distributed.toy import make_batches, make_toy
from tests.distributed.training_runs import DECAY, GLOBAL_BATCH, LR, STEPS, group_of
from tests.plain_digrap import Reference


@dataclass
class LossScale:
    """DeepSpeed's dynamic loss scale: halved by every overflow, doubled after ``window`` good steps in a row.

    Attributes:
        value: the scale of the next backward.
        window: good steps until it doubles. DeepSpeed doubles it before it unscales that step's gradient.
        skipped: the steps that overflowed.
    """

    value: float
    window: int = 1000
    skipped: list[int] = field(default_factory=list)
    grown: list[int] = field(default_factory=list)
    _last: int = -1

    def update(self, step: int, overflow: bool) -> None:
        if overflow:
            self.value /= 2
            self._last = step
            self.skipped.append(step)
        elif step - self._last - 1 > 0 and (step - self._last - 1) % self.window == 0:
            self.value *= 2
            self.grown.append(step)


def low_precision_run(
    method: str,
    theta0: dict[str, torch.Tensor],
    *,
    rounded_start: bool,
    ranks: int,
    mu: float,
    dtype: torch.dtype = torch.bfloat16,
    loss_scale: LossScale | None = None,
    max_grad_norm: float | None = None,
    bad_steps: Sequence[int] = (),
    autocast: bool = False,
    sums: torch.dtype | None = None,
    order: Sequence[int] | None = None,
) -> Reference:
    """float32 masters; gradients of ``dtype`` weights and inputs, per rank, averaged in ``sums`` (their own by default),
    in ``order`` (the ranks' by default).

    DeepSpeed rounds the initial weights before it copies its float32 masters from them: ``rounded_start``. With
    ``autocast`` the weights stay float32, and Linear's gradients are averaged in ``dtype``.
    """
    model = make_toy() if autocast else make_toy().to(dtype)
    initial = {name: p.detach() for name, p in make_toy().named_parameters()}
    start = {name: w.to(dtype).float() if rounded_start else w for name, w in initial.items()}
    trained = {name: start[name].clone() for name, p in model.named_parameters() if p.requires_grad}
    reference = Reference(
        trained,
        theta0,
        method,
        lr=lambda name: LR[group_of(name)],
        weight_decay=lambda name: DECAY[group_of(name)],
        strength_lr=mu,
        max_grad_norm=max_grad_norm,
    )
    for step, (x, y) in enumerate(make_batches(STEPS, GLOBAL_BATCH)):
        scale = 1.0 if loss_scale is None else loss_scale.value
        grads: dict[str, torch.Tensor | None] = {}
        for rank in order or range(ranks):
            part = slice(rank * GLOBAL_BATCH // ranks, (rank + 1) * GLOBAL_BATCH // ranks)
            leaves = {
                name: (w.clone() if autocast else w.to(dtype)).requires_grad_(True) for name, w in reference.w.items()
            }
            with torch.autocast("cpu", dtype=dtype, enabled=autocast):
                out = functional_call(model, leaves, (x[part] if autocast else x[part].to(dtype),))
            loss = cross_entropy(out.float(), y[part]) * scale
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for name, grad in zip(leaves, found, strict=True):
                before = grads.get(name)
                if grad is not None and autocast and "gain" not in name:
                    grad = grad.to(dtype)
                share = None if grad is None else grad.to(sums or grad.dtype) / ranks
                grads[name] = share if before is None or share is None else before + share
        full = {name: None if grad is None else grad.float() for name, grad in grads.items()}
        overflow = step in bad_steps or not all(g is None or bool(torch.isfinite(g).all()) for g in full.values())
        if loss_scale is not None:
            loss_scale.update(step, overflow)
        if overflow:
            continue
        if loss_scale is not None:
            full = {name: None if grad is None else grad / loss_scale.value for name, grad in full.items()}
        reference.step(full)
    return reference


class InAnyOrder(NamedTuple):
    """A run whose ranks' gradients are summed in their order, and what other orders change.

    Attributes:
        reference: the run.
        weights: the most that another order changes of an element of the weights.
        strength: of an ω.
    """

    reference: Reference
    weights: float
    strength: float


def low_precision_in_any_order(
    method: str, theta0: dict[str, torch.Tensor], *, ranks: int, loss_scale: LossScale | None = None, **settings: Any
) -> InAnyOrder:
    """``low_precision_run``, with the ranks in all orders: a sum of more than two rounded numbers depends on it."""
    orders = [order for order in permutations(range(ranks)) if order[0] < order[1]]  # the first two commute
    scales = [loss_scale, *(loss_scale and replace(loss_scale, skipped=[], grown=[]) for _ in orders[1:])]
    reference, *others = (
        low_precision_run(method, theta0, ranks=ranks, order=order, loss_scale=scale, **settings)
        for order, scale in zip(orders, scales, strict=True)
    )
    return InAnyOrder(
        reference,
        max((apart_by(reference.w, other.w) for other in others), default=0.0),
        max((abs(omega - o.omega[name]) for o in others for name, omega in reference.omega.items()), default=0.0),
    )


def apart_by(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of an element."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)
