"""DiGraP in one process, written straight from the method's equations with plain loops: what all backends must equal.

Nothing here imports the package. Weights are float32 leaves in a dict; AdamW is written out, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

Tensors = dict[str, torch.Tensor]


class Reference:
    """AdamW (decoupled decay) with DiGraP, DiGraP on the update, PCGrad, L2-SP, SPD, or nothing."""

    def __init__(
        self,
        weights: Tensors,
        theta0: Tensors,
        method: str,
        *,
        lr: Callable[[str], float],
        weight_decay: Callable[[str], float],
        strength_lr: float = 1e-2,
        weight: float = 0.1,
        max_grad_norm: float | None = None,
        normalization: str = "layers",
        hypergradient: str = "all",
    ) -> None:
        self.w = {name: tensor.clone() for name, tensor in weights.items()}
        self.theta0 = {name: tensor.float() for name, tensor in theta0.items()}
        self.method, self.lr, self.decay, self.mu, self.weight = method, lr, weight_decay, strength_lr, weight
        self.clip, self.normalization, self.hypergradient = max_grad_norm, normalization, hypergradient
        self.m = {n: torch.zeros_like(t) for n, t in self.w.items()}
        self.v = {n: torch.zeros_like(t) for n, t in self.w.items()}
        self.steps = {n: 0 for n in self.w}
        self.omega = {n: 0.0 for n in theta0}
        self.om = {n: 0.0 for n in theta0}
        self.ov = {n: 0.0 for n in theta0}
        self.t = 0
        self.p: Tensors = {}
        self.alpha: dict[str, float] = {}
        self.was_conflict: dict[str, bool] = {}
        self.conflicts = 0
        self.grad_norms: list[float] = []

    def _omega_step(self, h: dict[str, float]) -> None:
        k = self.t - 1
        for n, value in h.items():
            self.om[n] = 0.9 * self.om[n] + 0.1 * value
            self.ov[n] = 0.999 * self.ov[n] + 0.001 * value * value
            step = (self.om[n] / (1 - 0.9**k)) / (math.sqrt(self.ov[n] / (1 - 0.999**k)) + 1e-8)
            self.omega[n] = min(1.0, max(0.0, self.omega[n] - self.mu * step))

    def step(self, grads: dict[str, torch.Tensor | None]) -> None:
        present = {n: g.clone() for n, g in grads.items() if g is not None}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in present.values()))
        self.grad_norms.append(norm)
        if not math.isfinite(norm):
            return
        self.t += 1
        if self.clip is not None and norm > self.clip:
            present = {n: g * (self.clip / (norm + 1e-6)) for n, g in present.items()}
        d = {n: (self.w[n] - self.theta0[n]).double() for n in self.theta0}
        g64 = {n: present[n].double() if n in present else torch.zeros_like(d[n]) for n in d}
        if self.method in ("digrap", "digrap_update") and self.t > 1:
            sign = 1.0 if self.method == "digrap" else -1.0
            h = {}
            for n in d:
                scale = self.alpha[n] if self.method == "digrap" else 1.0
                h[n] = sign * scale * float((g64[n] * self.p[n]).sum())
                masked = self.hypergradient == "conflicts" or self.method == "digrap_update"
                if masked and not self.was_conflict[n]:
                    h[n] = 0.0
                if self.normalization == "cosine":
                    size = scale * float(g64[n].norm() * self.p[n].norm())
                    h[n] = h[n] / size if size > 0 else 0.0
            if self.normalization == "layers":
                total = math.sqrt(sum(value * value for value in h.values()))
                h = {n: value / total if total > 0 else 0.0 for n, value in h.items()}
            self._omega_step(h)
        before = {n: w.clone() for n, w in self.w.items()}
        for n in d:
            inner, square = float((g64[n] * d[n]).sum()), float(d[n].square().sum())
            c = inner / square if square > 0 else 0.0
            omega = {"digrap": self.omega[n], "pcgrad": 1.0}.get(self.method, 0.0)
            if self.method == "digrap":
                self.p[n] = c * d[n]
                self.was_conflict[n] = inner < 0
            if inner < 0:
                self.conflicts += 1
                if n in present:
                    present[n] = (present[n].double() - omega * c * d[n]).float()
            if self.method == "l2sp" and n in present:
                present[n] = (present[n].double() + self.weight * d[n]).float()
        for n, g in present.items():
            self.steps[n] += 1
            k = self.steps[n]
            self.m[n] = 0.9 * self.m[n] + 0.1 * g
            self.v[n] = 0.999 * self.v[n] + 0.001 * g * g
            self.w[n] = self.w[n] * (1 - self.lr(n) * self.decay(n))
            self.w[n] = self.w[n] - self.lr(n) * (self.m[n] / (1 - 0.9**k)) / (
                (self.v[n] / (1 - 0.999**k)).sqrt() + 1e-8
            )
        for n in d:
            u = (self.w[n] - before[n]).double()
            square = float(d[n].square().sum())
            if self.method == "digrap_update":
                a = float((u * d[n]).sum()) / square if square > 0 else 0.0
                self.p[n] = a * d[n]
                self.was_conflict[n] = a > 0
                if a > 0:
                    self.conflicts += 1
                    self.w[n] = (self.w[n].double() - self.omega[n] * a * d[n]).float()
            if self.method == "spd" and float((g64[n] * d[n]).sum()) > 0:
                new = (self.w[n] - self.theta0[n]).double()
                r = min(1.0, max(0.0, float((new.norm() - d[n].norm()) / new.norm())))
                self.w[n] = (self.w[n].double() - self.weight * r * new).float()
        self.alpha = {n: self.lr(n) for n in d}


def run(
    reference: Reference,
    loss_of: Callable[[Tensors, object], torch.Tensor],
    batches: Sequence[object],
) -> Reference:
    """Take a step on every batch; ``loss_of(weights, batch)`` is a pure function."""
    for batch in batches:
        leaves = {n: w.clone().requires_grad_(True) for n, w in reference.w.items()}
        grads = torch.autograd.grad(loss_of(leaves, batch), list(leaves.values()), allow_unused=True)
        reference.step(dict(zip(leaves, grads, strict=True)))
    return reference
