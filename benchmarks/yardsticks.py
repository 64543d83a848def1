"""What a projected step is held against: a plain copy, and DiGraP as research code writes it today.

Nothing here imports the package.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch


class NaiveDiGraP(torch.optim.Optimizer):
    """DiGraP with AdamW, one parameter and one tensor operation after the other, in the style of published optimizers.

    It keeps θ₀ and the last projection in the parameter's dtype, takes ω's Adam on one-element tensors, and normalises
    each layer's hyper-gradient by itself. One process only.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, strength_lr: float) -> None:
        super().__init__(params, {"lr": lr, "mu": strength_lr, "betas": (0.9, 0.999), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, g = self.state[p], p.grad
                if not state:
                    state.update(
                        step=0,
                        m=torch.zeros_like(p),
                        v=torch.zeros_like(p),
                        start=p.detach() * 0.1,
                        omega=torch.zeros(1),
                        omega_m=torch.zeros(1),
                        omega_v=torch.zeros(1),
                        projection=torch.zeros_like(p),
                    )
                state["step"] += 1
                k = state["step"]
                d = p - state["start"]
                inner, square = torch.sum(g * d), torch.sum(d * d)
                projection = inner / (square + 1e-12) * d
                if k > 1:
                    last = state["projection"]
                    h = torch.sum(g * last) / (torch.norm(g) * torch.norm(last) + 1e-12)
                    state["omega_m"].mul_(beta1).add_(h, alpha=1 - beta1)
                    state["omega_v"].mul_(beta2).addcmul_(h, h, value=1 - beta2)
                    m_hat, v_hat = state["omega_m"] / (1 - beta1**k), state["omega_v"] / (1 - beta2**k)
                    state["omega"].sub_(group["mu"] * m_hat / (v_hat.sqrt() + 1e-8)).clamp_(0, 1)
                state["projection"] = projection
                if inner.item() < 0:
                    g = g - state["omega"] * projection
                state["m"].mul_(beta1).add_(g, alpha=1 - beta1)
                state["v"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
                denominator = (state["v"] / (1 - beta2**k)).sqrt().add_(group["eps"])
                p.addcdiv_(state["m"] / (1 - beta1**k), denominator, value=-group["lr"])


def copy_gigabytes_per_second(elements: int) -> float:
    """A plain copy of float32: bytes read and written in a second, best of five."""
    source = torch.randn(elements)
    target = torch.empty_like(source)
    return 2 * elements * 4 / min(seconds(lambda: target.copy_(source)) for _ in range(5)) / 1e9


def read_gigabytes_per_second(elements: int) -> float:
    """A plain sum of float32: bytes read in a second, best of five."""
    source = torch.randn(elements)
    return elements * 4 / min(seconds(source.sum) for _ in range(5)) / 1e9


def seconds(action: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
