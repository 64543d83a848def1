"""One pass over the shards → a few float64 numbers a layer: all that a method needs, and all that crosses ranks.

Shapes: L layers, K statistics, N local elements of a layer.

Memory traffic is the cost, so large layers are walked in blocks that stay in cache and small ones are packed together
(one kernel for many layers). Products are float32, sums across blocks float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from digrap_scale.types import ShardView

# Columns of the gradient statistics, stats_LK.
GRAD_DISPLACEMENT = 0  # ⟨g, d_t⟩
DISPLACEMENT_SQ = 1  # ‖d_t‖²
GRAD_PREVIOUS = 2  # ⟨g, d_{t-1}⟩ (0 where nothing keeps the previous weights)
GRAD_SQ = 3  # ‖g‖²; not finite exactly where the layer's gradient is not (or its norm overflows float32)
GRADIENT_STATISTICS = 4

# Columns of the update statistics.
UPDATE_DISPLACEMENT = 0  # ⟨u, d_t⟩ with u = θ_new − θ_{t-1}
UPDATE_SQ = 1  # ‖u‖²
UPDATE_STATISTICS = 2

BLOCK_ELEMENTS = 1 << 18  # 1 MiB of float32: a block's operands fit a core's share of cache


@dataclass
class Span:
    """A piece of work: one block of a large layer, or several whole small layers packed side by side."""

    layers: list[int]
    views: list[ShardView]
    start: int = 0
    stop: int = 0
    lengths: list[int] = field(default_factory=list)


def spans(views: Sequence[ShardView], layers: Sequence[int], block_elements: int = BLOCK_ELEMENTS) -> Iterator[Span]:
    """Cut ``views`` (rows ``layers`` of the statistics) into pieces of at most ``block_elements``; empty shards vanish.

    Only layers of the same kind (dtypes, device, reference or none) are packed together.
    """
    packs: dict[tuple[object, ...], Span] = {}
    for layer, view in zip(layers, views, strict=True):
        size = view.weight.numel()
        if size == 0:
            continue
        if size >= block_elements // 4:
            for start in range(0, size, block_elements):
                yield Span([layer], [view], start, min(start + block_elements, size))
            continue
        pack = packs.setdefault(_kind(view), Span([], []))
        if pack.lengths and sum(pack.lengths) + size > block_elements:
            yield pack
            pack = packs[_kind(view)] = Span([], [])
        pack.layers.append(layer)
        pack.views.append(view)
        pack.lengths.append(size)
    yield from packs.values()


def _kind(view: ShardView) -> tuple[object, ...]:
    return (
        view.weight.dtype,
        view.weight.device,
        None if view.grad is None else view.grad.dtype,
        view.projected,
        None if view.reference is None else view.reference.dtype,
        view.previous is None,
    )


def gather(span: Span, name: str) -> torch.Tensor | None:
    """The span's elements of ``grad`` / ``weight`` / ``reference`` / ``previous`` as one flat tensor (None if absent).

    What lives elsewhere (a reference kept on the CPU) comes to the weight's device here, a span at a time.
    """
    tensors: list[torch.Tensor] = [getattr(view, name) for view in span.views]
    if tensors[0] is None:
        return None
    device = span.views[0].weight.device
    if not span.lengths:
        return tensors[0][span.start : span.stop].to(device, non_blocking=True)
    return torch.cat(tensors).to(device, non_blocking=True)


def displacement(weight: torch.Tensor, reference: torch.Tensor | None) -> torch.Tensor:
    """d = θ − θ₀ in float32 (θ itself where the reference is zero)."""
    if reference is None:
        return weight.float()
    return torch.sub(weight.float() if weight.dtype != torch.float32 else weight, reference)


class Totals:
    """Sums products of spans into ``stats_LK`` (float64, on the shards' device)."""

    def __init__(self, layers: int, columns: int, device: torch.device) -> None:
        self.stats_LK = torch.zeros(layers, columns, dtype=torch.float64, device=device)

    def add(self, span: Span, column: int, a: torch.Tensor, b: torch.Tensor) -> None:
        """stats[layer, column] += ⟨a, b⟩ for each of the span's layers."""
        if not span.lengths:
            self.stats_LK[span.layers[0], column] += torch.dot(a, b)
            return
        lengths = torch.tensor(span.lengths, device=a.device)
        sums = torch.segment_reduce(a * b, "sum", lengths=lengths)
        self.stats_LK[span.layers, column] += sums


def gradient_statistics(views: Sequence[ShardView], *, with_previous: bool) -> torch.Tensor:
    """⟨g, d_t⟩, ‖d_t‖², ⟨g, d_{t-1}⟩ and ‖g‖² of this rank's shards (METHOD §1, Algorithm 1 of arXiv 2502.15895).

    Args:
        views: all layers of the step, in their fixed order; shards may be empty, gradients absent (they count as zeros).
        with_previous: whether ⟨g, d_{t-1}⟩ is wanted; layers without ``previous`` keep 0 there.

    Returns:
        stats_LK: [L, 4] float64 on the shards' device.
    """
    device = views[0].weight.device if views else torch.device("cpu")
    totals = Totals(len(views), GRADIENT_STATISTICS, device)
    for span in spans(views, range(len(views))):
        grad, weight, reference = gather(span, "grad"), gather(span, "weight"), gather(span, "reference")
        assert weight is not None
        if grad is not None:
            grad = grad.float()
            totals.add(span, GRAD_SQ, grad, grad)
        if not span.views[0].projected:
            continue
        now = displacement(weight, reference)
        totals.add(span, DISPLACEMENT_SQ, now, now)
        if grad is None:
            continue
        totals.add(span, GRAD_DISPLACEMENT, grad, now)
        previous = gather(span, "previous") if with_previous else None
        if previous is not None:
            totals.add(span, GRAD_PREVIOUS, grad, displacement(previous, reference))
    stats_LK = totals.stats_LK
    scales = [view.grad_scale for view in views]
    if any(scale != 1.0 for scale in scales):
        scale_L = torch.tensor(scales, dtype=torch.float64, device=device)
        stats_LK[:, GRAD_DISPLACEMENT] *= scale_L
        stats_LK[:, GRAD_PREVIOUS] *= scale_L
        stats_LK[:, GRAD_SQ] *= scale_L**2
    return stats_LK


def update_statistics(views: Sequence[ShardView]) -> torch.Tensor:
    """⟨u, d_t⟩ and ‖u‖² of this rank's shards, u = θ_new − θ_{t-1} being the optimizer's whole step.

    ``views`` hold the new weights, and in ``previous`` the ones before the step. Returns [L, 2] float64.
    """
    device = views[0].weight.device if views else torch.device("cpu")
    totals = Totals(len(views), UPDATE_STATISTICS, device)
    for span in spans(views, range(len(views))):
        if not span.views[0].projected:
            continue
        weight, previous, reference = gather(span, "weight"), gather(span, "previous"), gather(span, "reference")
        assert weight is not None and previous is not None
        update = weight.float() - previous.float()
        totals.add(span, UPDATE_SQ, update, update)
        totals.add(span, UPDATE_DISPLACEMENT, update, displacement(previous, reference))
    return totals.stats_LK
