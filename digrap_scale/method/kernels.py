"""The passes over memory that a step costs, for one large layer: inner products, x ← s·x + f·(θ − θ₀), and Adam on it.

Two versions with equal results (to float32 rounding): cache-blocked eager, which runs anywhere, and ``torch.compile``d,
which reads every operand once. Shapes: N elements of a flat shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from digrap_scale.types import AdamMoments

BLOCK_ELEMENTS = 1 << 19  # 2 MiB of float32: a block's operands stay in a core's share of cache
ROW_ELEMENTS = 1 << 12  # compiled: float32 sums run over so many elements, float64 above them
LARGE_ELEMENTS = 1 << 14  # smaller layers are packed together instead
PACK_ELEMENTS = 1 << 16  # of a pack: its operands are fresh memory, which costs more by the page the larger it is
COMPILED_ELEMENTS = 1 << 18  # a compiled call costs about 0.2 ms beyond its work: smaller layers go the eager way
# On accelerators a launch costs what megabytes do: more is packed together, and packs are larger (32 MiB an operand).
ACCELERATOR_LARGE_ELEMENTS = 1 << 21
ACCELERATOR_PACK_ELEMENTS = 1 << 23


def large_from(device: torch.device) -> int:
    """From how many elements on a layer is walked by itself; smaller ones are packed together."""
    return LARGE_ELEMENTS if device.type == "cpu" else ACCELERATOR_LARGE_ELEMENTS


def pack_size(device: torch.device) -> int:
    """How many elements of small layers go into one pack."""
    return PACK_ELEMENTS if device.type == "cpu" else ACCELERATOR_PACK_ELEMENTS


class AdamNumbers(NamedTuple):
    """What one step of Adam on one layer is taken with.

    g = scale · grad + factor · (θ − θ₀) + coupled · θ;  m ← β₁ · m + keep1 · g;  v ← β₂ · v + keep2 · g²;
    θ ← θ − decay · θ − step_size · m / (√v · second_scale + eps).

    keep1 = 1 − β₁, keep2 = 1 − β₂, step_size = lr / (1 − β₁^k), second_scale = 1 / √(1 − β₂^k) at the layer's k-th step;
    ``coupled`` is Adam's weight decay λ (else 0), ``decay`` is AdamW's lr · λ (else 0).
    """

    scale: float
    factor: float
    coupled: float
    beta1: float
    keep1: float
    beta2: float
    keep2: float
    step_size: float
    second_scale: float
    eps: float
    decay: float


def device_rows(rows: Sequence[Sequence[float]], device: torch.device) -> list[torch.Tensor]:
    """Numbers of many layers as float32 tensors on ``device``, by one transfer: one a layer would wait for the device
    each time. Tensors, so that other values do not mean another compilation; each row is aligned for wide loads."""
    if not rows:
        return []
    width = len(rows[0])
    table = torch.zeros(len(rows), -(-width // 16) * 16)
    table[:, :width] = torch.tensor([list(row) for row in rows], dtype=torch.float32)
    return [row[:width] for row in send(table, device).unbind()]


def send(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the host's on ``device``. On CUDA in the stream's order: a copy from memory that is not pinned waits
    for all that was launched before (inside FSDP2's backward for a reduction, too)."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def displacement(weight: torch.Tensor, reference: torch.Tensor | None) -> torch.Tensor:
    """d = θ − θ₀ in float32 (θ itself where the reference is zero)."""
    exact = weight if weight.dtype == torch.float32 else weight.float()
    return exact if reference is None else torch.sub(exact, reference)


class Kernels:
    """Cache-blocked eager.

    Attributes:
        name: the config's word for it.
        row_elements: sums are taken of whole rows of so many elements; what is left over of a layer goes with small ones.
    """

    name = "eager"
    row_elements = 1

    def __init__(self) -> None:
        self._scratches: dict[tuple[torch.device, int], torch.Tensor] = {}

    def gradient_products(
        self,
        grad: torch.Tensor | None,
        weight: torch.Tensor,
        reference: torch.Tensor | None,
        previous: torch.Tensor | None,
        projected: bool,
        moments: AdamMoments | None = None,
        factors: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """⟨g, d_t⟩, ‖d_t‖², ⟨g, d_{t-1}⟩, ‖g‖²: [4] float64; 0 where an operand is absent.

        ``factors`` are the moments' on the weight's device (``device_rows``).
        """
        sums = torch.zeros(4, dtype=torch.float64, device=weight.device)
        for start in range(0, weight.numel(), BLOCK_ELEMENTS):
            block = slice(start, start + BLOCK_ELEMENTS)
            g = None if grad is None else grad[block].float()
            if g is not None:
                sums[3] += torch.dot(g, g)
            if not projected:
                continue
            w, r = weight[block], _part(reference, block, weight.device)
            d = self._displacement(w, r, 0)
            sums[1] += torch.dot(d, d)
            if g is not None:
                sums[0] += torch.dot(g, d)
                if moments is not None:
                    before = self._weights_before(w, moments.part(block))
                    sums[2] += torch.dot(g, before if r is None else before.sub_(r))
                elif previous is not None:
                    sums[2] += torch.dot(g, self._displacement(previous[block], r, 1))
        return sums

    def update_products(
        self, weight: torch.Tensor, previous: torch.Tensor, reference: torch.Tensor | None
    ) -> torch.Tensor:
        """⟨u, d_t⟩, ‖u‖² with u = ``weight`` − ``previous``, d_t = ``previous`` − θ₀: [2] float64."""
        sums = torch.zeros(2, dtype=torch.float64, device=weight.device)
        for start in range(0, weight.numel(), BLOCK_ELEMENTS):
            block = slice(start, start + BLOCK_ELEMENTS)
            before = previous[block].float()
            u = self._displacement(weight[block], before, 1)
            sums[0] += torch.dot(u, self._displacement(before, _part(reference, block, weight.device), 0))
            sums[1] += torch.dot(u, u)
        return sums

    def add_displacement_(
        self,
        target: torch.Tensor,
        theta: torch.Tensor,
        reference: torch.Tensor | None,
        factor: float,
        scale: float,
        factors: torch.Tensor,
    ) -> None:
        """``target`` ← scale · ``target`` + factor · (``theta`` − θ₀), summed in float32 and rounded once.

        ``factors`` are factor and scale on the target's device (``device_rows``).
        """
        for start in range(0, target.numel(), BLOCK_ELEMENTS):
            block = slice(start, start + BLOCK_ELEMENTS)
            d = self._displacement(theta[block], _part(reference, block, target.device), 0)
            part = target[block]
            exact = part if part.dtype == torch.float32 else part.float()
            if scale != 1.0:
                exact.mul_(scale)
            exact.add_(d, alpha=factor)
            if exact is not part:
                part.copy_(exact)

    def adam_(
        self,
        grad: torch.Tensor,
        weight: torch.Tensor,
        reference: torch.Tensor | None,
        first: torch.Tensor,
        second: torch.Tensor,
        numbers: AdamNumbers,
        factors: torch.Tensor,
    ) -> None:
        """One step of Adam on ``weight``, its moments too, with the gradient scale · ``grad`` + factor · (θ − θ₀).

        ``factors`` are the ``numbers`` on the weight's device (``device_rows``).
        """
        n = numbers
        for start in range(0, weight.numel(), BLOCK_ELEMENTS):
            block = slice(start, start + BLOCK_ELEMENTS)
            w, m, v = weight[block], first[block], second[block]
            g = self._scratch(w, 0)
            torch.mul(grad[block], n.scale, out=g)
            if n.factor != 0.0:
                g.add_(self._displacement(w, _part(reference, block, weight.device), 1), alpha=n.factor)
            if n.coupled != 0.0:
                g.add_(w, alpha=n.coupled)
            m.mul_(n.beta1).add_(g, alpha=n.keep1)
            v.mul_(n.beta2).addcmul_(g, g, value=n.keep2)
            denominator = torch.sqrt(v, out=self._scratch(w, 1)).mul_(n.second_scale).add_(n.eps)
            if n.decay != 0.0:
                w.sub_(torch.mul(w, n.decay, out=g))
            w.addcdiv_(m, denominator, value=-n.step_size)

    def _scratch(self, like: torch.Tensor, number: int) -> torch.Tensor:
        """A block of float32 memory that stays: fresh megabytes for every operation would cost more than the operation."""
        key = (like.device, number)
        if key not in self._scratches or self._scratches[key].numel() < BLOCK_ELEMENTS:
            self._scratches[key] = torch.empty(BLOCK_ELEMENTS, dtype=torch.float32, device=like.device)
        return self._scratches[key][: like.numel()]

    def _displacement(self, weight: torch.Tensor, reference: torch.Tensor | None, number: int) -> torch.Tensor:
        """``displacement`` of a block, in scratch memory."""
        if reference is None or weight.dtype != torch.float32:
            return displacement(weight, reference)
        return torch.sub(weight, reference, out=self._scratch(weight, number))

    def _weights_before(self, weight: torch.Tensor, moments: AdamMoments) -> torch.Tensor:
        """θ before Adam's last step, in float32, of a block, in scratch memory."""
        shrink, step_size, second_scale, eps = moments.factors
        denominator = torch.sqrt(moments.second, out=self._scratch(weight, 1)).mul_(second_scale).add_(eps)
        return torch.addcdiv(weight.float(), moments.first, denominator, value=step_size, out=denominator).div_(shrink)


class CompiledKernels(Kernels):
    """``torch.compile``d: one read of every operand."""

    name = "compile"
    row_elements = ROW_ELEMENTS

    def __init__(self) -> None:
        super().__init__()
        self._gradient: Callable[..., torch.Tensor] = torch.compile(_gradient_rows, dynamic=True)
        self._gradient_adam: Callable[..., torch.Tensor] = torch.compile(_gradient_rows_adam, dynamic=True)
        self._update: Callable[..., torch.Tensor] = torch.compile(_update_rows, dynamic=True)
        self._add: Callable[..., Any] = torch.compile(_add_rows_, dynamic=True)
        self._adam: Callable[..., Any] = torch.compile(_adam_rows_, dynamic=True)

    def gradient_products(
        self,
        grad: torch.Tensor | None,
        weight: torch.Tensor,
        reference: torch.Tensor | None,
        previous: torch.Tensor | None,
        projected: bool,
        moments: AdamMoments | None = None,
        factors: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if grad is None or not projected or not _worth_it(weight):
            return super().gradient_products(grad, weight, reference, previous, projected, moments)
        on = weight.device
        reference, previous = _part(reference, slice(None), on), _part(previous, slice(None), on)
        if moments is None:
            return self._gradient(grad, weight, reference, previous)
        assert factors is not None
        return self._gradient_adam(grad, weight, reference, moments.first, moments.second, factors)

    def update_products(
        self, weight: torch.Tensor, previous: torch.Tensor, reference: torch.Tensor | None
    ) -> torch.Tensor:
        if not _worth_it(weight):
            return super().update_products(weight, previous, reference)
        return self._update(weight, previous, _part(reference, slice(None), weight.device))

    def add_displacement_(
        self,
        target: torch.Tensor,
        theta: torch.Tensor,
        reference: torch.Tensor | None,
        factor: float,
        scale: float,
        factors: torch.Tensor,
    ) -> None:
        if target.device.type == "cpu" and target.numel() < COMPILED_ELEMENTS:
            return super().add_displacement_(target, theta, reference, factor, scale, factors)
        self._add(target, theta, _part(reference, slice(None), target.device), factors)

    def adam_(
        self,
        grad: torch.Tensor,
        weight: torch.Tensor,
        reference: torch.Tensor | None,
        first: torch.Tensor,
        second: torch.Tensor,
        numbers: AdamNumbers,
        factors: torch.Tensor,
    ) -> None:
        if weight.device.type == "cpu" and weight.numel() < COMPILED_ELEMENTS:
            return super().adam_(grad, weight, reference, first, second, numbers, factors)
        self._adam(grad, weight, _part(reference, slice(None), weight.device), first, second, factors)


def _worth_it(weight: torch.Tensor) -> bool:
    """Whether a layer goes to a compiled kernel that sums whole rows."""
    return weight.numel() % ROW_ELEMENTS == 0 and (weight.device.type != "cpu" or weight.numel() >= COMPILED_ELEMENTS)


def _part(tensor: torch.Tensor | None, part: slice, device: torch.device) -> torch.Tensor | None:
    """A piece of an operand, brought to ``device`` if it is kept elsewhere (a reference on the CPU)."""
    return None if tensor is None else tensor[part].to(device, non_blocking=True)


def _gradient_rows(
    grad: torch.Tensor, weight: torch.Tensor, reference: torch.Tensor | None, previous: torch.Tensor | None
) -> torch.Tensor:
    g, w = grad.view(-1, ROW_ELEMENTS).float(), weight.view(-1, ROW_ELEMENTS).float()
    r = 0.0 if reference is None else reference.view(-1, ROW_ELEMENTS).float()
    d = w - r
    products = [g * d, d * d, g * g]
    if previous is not None:
        products.insert(2, g * (previous.view(-1, ROW_ELEMENTS).float() - r))
    sums = [product.sum(1).double().sum() for product in products]
    if previous is None:
        sums.insert(2, torch.zeros_like(sums[0]))
    return torch.stack(sums)


def _gradient_rows_adam(
    grad: torch.Tensor,
    weight: torch.Tensor,
    reference: torch.Tensor | None,
    first: torch.Tensor,
    second: torch.Tensor,
    factors: torch.Tensor,
) -> torch.Tensor:
    # One division an element: it is what bounds this kernel, not memory.
    inverse = 1.0 / factors[0]
    denominator = second.sqrt() * factors[2] + factors[3]
    previous = weight * inverse + (factors[1] * inverse) * (first / denominator)
    return _gradient_rows(grad, weight, reference, previous)


def _update_rows(weight: torch.Tensor, previous: torch.Tensor, reference: torch.Tensor | None) -> torch.Tensor:
    before = previous.view(-1, ROW_ELEMENTS).float()
    u = weight.view(-1, ROW_ELEMENTS).float() - before
    d = before if reference is None else before - reference.view(-1, ROW_ELEMENTS).float()
    return torch.stack([(u * d).sum(1).double().sum(), (u * u).sum(1).double().sum()])


def _add_rows_(
    target: torch.Tensor, theta: torch.Tensor, reference: torch.Tensor | None, factors: torch.Tensor
) -> None:
    d = theta.float() if reference is None else theta.float() - reference.float()
    target.copy_(target.float() * factors[1] + d * factors[0])


def _adam_rows_(
    grad: torch.Tensor,
    weight: torch.Tensor,
    reference: torch.Tensor | None,
    first: torch.Tensor,
    second: torch.Tensor,
    factors: torch.Tensor,
) -> None:
    """torch's AdamW (Adam where the decay is coupled), on the projected gradient, in one pass: see ``AdamNumbers``."""
    scale, factor, coupled, beta1, keep1, beta2, keep2, step_size, second_scale, eps, decay = factors.unbind()
    d = weight if reference is None else weight - reference.float()
    g = grad.float() * scale + d * factor + weight * coupled
    m = first * beta1 + g * keep1
    v = second * beta2 + (g * g) * keep2
    # θ − lr·λ·θ, not (1 − lr·λ)·θ: in float32 a small lr·λ would drown in the 1.
    weight.copy_(weight - (weight * decay + step_size * (m / (v.sqrt() * second_scale + eps))))
    first.copy_(m)
    second.copy_(v)
