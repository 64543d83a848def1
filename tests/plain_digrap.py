"""DiGraP in one process, written straight from the method's equations with plain loops: what all backends must equal.

Nothing here imports the package. Weights are float32 leaves in a dict; AdamW is written out, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

Tensors = dict[str, torch.Tensor]


class Reference:
    """AdamW (decoupled decay) with DiGraP, DiGraP on the update, PCGrad, L2-SP, SPD, FTP, LP-FT, or nothing."""

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
        annealing: float = 1.0,
        head: str = "",
        probe_steps: int = 0,
        grouping: Callable[[str], str] = str,
        fixed_strength: float | None = None,
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
        self.kappa, self.head, self.probe_steps = annealing, head, probe_steps
        self.seen = 0
        self.fixed = fixed_strength
        names: dict[str, list[str]] = {}
        for n in theta0:
            names.setdefault(grouping(n), []).append(n)
        self.group = {n: members for members in names.values() for n in members}
        self.gamma: dict[str, float] = {}
        self.gm = {n: 0.0 for n in theta0}
        self.gv = {n: 0.0 for n in theta0}
        self.c: Tensors = {}
        self.c_norms: Tensors = {}
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
        self.seen += 1
        if self.method in ("linear_probe", "lp_ft"):
            if self.method == "linear_probe" or self.seen <= self.probe_steps:
                present = {n: g for n, g in present.items() if n.startswith(self.head)}
            elif self.seen == self.probe_steps + 1:  # a second run begins: nothing is left of the optimizer's state
                for n in self.w:
                    self.m[n], self.v[n], self.steps[n] = torch.zeros_like(self.m[n]), torch.zeros_like(self.v[n]), 0
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in present.values()))
        self.grad_norms.append(norm)
        if not math.isfinite(norm):
            return
        self.t += 1
        if self.clip is not None and norm > self.clip:
            present = {n: g * (self.clip / (norm + 1e-6)) for n, g in present.items()}
        d = {n: (self.w[n] - self.theta0[n]).double() for n in self.theta0}
        g64 = {n: present[n].double() if n in present else torch.zeros_like(d[n]) for n in d}
        learns = self.method in ("digrap", "digrap_update") and self.fixed is None
        if self.fixed is not None:
            self.omega = dict.fromkeys(self.omega, self.fixed)
        if learns and self.t > 1:
            sign = 1.0 if self.method == "digrap" else -1.0
            h = {}
            for n in d:
                scale = self.alpha if self.method == "digrap" else dict.fromkeys(self.group[n], 1.0)
                h[n] = sign * sum(scale[k] * float((g64[k] * self.p[k]).sum()) for k in self.group[n])
                masked = self.hypergradient == "conflicts" or self.method == "digrap_update"
                if masked and not self.was_conflict[n]:
                    h[n] = 0.0
                if self.normalization == "cosine":
                    size = math.sqrt(sum(scale[k] ** 2 * float(g64[k].square().sum()) for k in self.group[n]))
                    size *= math.sqrt(sum(float(self.p[k].square().sum()) for k in self.group[n]))
                    h[n] = h[n] / size if size > 0 else 0.0
            if self.normalization == "layers":
                total = math.sqrt(sum(value**2 / len(self.group[n]) for n, value in h.items()))
                h = {n: value / total if total > 0 else 0.0 for n, value in h.items()}
            self._omega_step(h)
        before = {n: w.clone() for n, w in self.w.items()}
        for n in d:
            inner = sum(float((g64[k] * d[k]).sum()) for k in self.group[n])
            square = sum(float(d[k].square().sum()) for k in self.group[n])
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
            if self.method == "ftp" and n in present:
                self._ftp(n, g64[n])
        self.alpha = {n: self.lr(n) for n in d}

    def _ftp(self, n: str, g: torch.Tensor) -> None:
        c = (self.w[n] - self.theta0[n]).double()
        norms = c.abs().sum(dim=tuple(range(1, c.dim())), keepdim=True) + 1e-8
        if c.dim() < 2:
            norms = c.abs().sum() + 1e-8
        if self.t == 1:
            self.gamma[n] = 1e-8
        else:
            h = float((g * self.c[n] / self.c_norms[n]).sum())
            h = self.kappa * h if h > 0 else h
            self.gm[n] = 0.9 * self.gm[n] + 0.1 * h
            self.gv[n] = 0.999 * self.gv[n] + 0.001 * h * h
            step = (self.gm[n] / (1 - 0.9**self.t)) / (math.sqrt(self.gv[n] / (1 - 0.999**self.t)) + 1e-8)
            self.gamma[n] = min(max(self.gamma[n] - 1e-2 * step, 1e-8), float(norms.max()))
        self.w[n] = (self.theta0[n].double() + (self.gamma[n] / norms).clamp(0, 1) * c).float()
        self.c[n], self.c_norms[n] = c, norms


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
