"""One pass over the shards → a few float64 numbers a layer: all that a method needs, and all that crosses ranks.

Shapes: L layers, K statistics, N local elements of a layer.

Memory traffic is the cost: large layers go through ``kernels`` one by one, small ones are packed together, so that one
operation serves many layers. Products are float32, sums across blocks and ranks float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from digrap_scale.method.kernels import Kernels, device_rows, displacement, large_from, pack_size, send
from digrap_scale.method.native import NativeKernels
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


PACK_ROW = 64  # elements: a whole number of vector registers; segment_reduce alone takes them one by one


@dataclass
class Pack:
    """Small layers side by side, so that one operation serves many; all of one kind (see ``_kind``)."""

    layers: list[int] = field(default_factory=list)
    views: list[ShardView] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    elements: int = 0
    _rows: torch.Tensor | None = None

    def gather(self, name: str) -> torch.Tensor | None:
        """All elements of ``grad`` / ``weight`` / ``reference`` / ``previous`` as one flat tensor (None if absent).

        Zeros fill every layer up to whole rows, so that sums can be taken of rows.
        """
        tensors: list[torch.Tensor] = [getattr(view, name) for view in self.views]
        return None if tensors[0] is None else self._together(tensors)

    def _together(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        filler = torch.zeros(PACK_ROW, dtype=tensors[0].dtype, device=tensors[0].device)
        parts = [
            part
            for tensor, length in zip(tensors, self.lengths, strict=True)
            for part in (tensor, filler[: -length % PACK_ROW])
        ]
        return torch.cat(parts).to(self.views[0].weight.device, non_blocking=True)

    def pieces(self, together: torch.Tensor) -> list[torch.Tensor]:
        """The layers' parts of a tensor in the form of ``gather``'s."""
        parts = together.split([length + -length % PACK_ROW for length in self.lengths])
        return [part[:length] for part, length in zip(parts, self.lengths, strict=True)]

    def spread(self, numbers: torch.Tensor) -> torch.Tensor:
        """A number a layer ([layers, …]), repeated for each of its elements and what fills them up."""
        # The size is told: else the device is asked for it, and waited for.
        size = sum(self._row_counts()) * PACK_ROW
        return numbers.repeat_interleave(self.rows(numbers.device) * PACK_ROW, dim=0, output_size=size)

    def rows(self, device: torch.device) -> torch.Tensor:
        """How many rows each layer has."""
        if self._rows is None:
            self._rows = send(torch.tensor(self._row_counts()), device)
        return self._rows

    def _row_counts(self) -> list[int]:
        return [-(-length // PACK_ROW) for length in self.lengths]

    def previous(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The weights before the last step, kept or computed again from Adam's moments (None if neither is there)."""
        if self.views[0].moments is None:
            return self.gather("previous")
        moments = [view.moments for view in self.views if view.moments is not None]
        factors = send(torch.tensor([one.factors for one in moments], dtype=torch.float32), weight.device)
        if len({one.factors for one in moments}) == 1:
            shrink, step_size, second_scale, eps = factors[0].unbind()
        else:
            shrink, step_size, second_scale, eps = self.spread(factors).unbind(1)
        denominator = self._together([one.second for one in moments]).sqrt_().mul_(second_scale).add_(eps)
        update = self._together([one.first for one in moments]).div_(denominator).mul_(step_size)
        return update.add_(weight).div_(shrink)

    def sums(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """⟨a, b⟩ of each layer: [layers of the pack] float64; float32 within rows."""
        of_rows = (a * b).view(-1, PACK_ROW).sum(1).double()
        # `unsafe`: lengths that are ours need no check, which would wait for the device.
        return torch.segment_reduce(of_rows, "sum", lengths=self.rows(a.device), unsafe=True)


def pack_small(views: Sequence[ShardView]) -> tuple[list[int], list[Pack]]:
    """Rows of the large layers, to be walked one by one, and packs of the small ones; empty shards are in neither."""
    large: list[int] = []
    packs: list[Pack] = []
    open_packs: dict[tuple[object, ...], Pack] = {}
    device = views[0].weight.device if views else torch.device("cpu")
    large_elements, pack_elements = large_from(device), pack_size(device)
    for row, view in enumerate(views):
        size = view.weight.numel()
        if size >= large_elements:
            large.append(row)
        elif size > 0:
            kind = _kind(view)
            pack = open_packs.get(kind)
            if pack is None or pack.elements + size > pack_elements:
                pack = open_packs[kind] = Pack()
                packs.append(pack)
            pack.elements += size
            pack.layers.append(row)
            pack.views.append(view)
            pack.lengths.append(size)
    return large, packs


def _kind(view: ShardView) -> tuple[object, ...]:
    return (
        view.weight.dtype,
        view.weight.device,
        None if view.grad is None else view.grad.dtype,
        view.projected,
        None if view.reference is None else view.reference.dtype,
        view.previous is None,
        view.moments is None,
    )


def gradient_statistics(views: Sequence[ShardView], kernels: Kernels, *, with_previous: bool) -> torch.Tensor:
    """⟨g, d_t⟩, ‖d_t‖², ⟨g, d_{t-1}⟩ and ‖g‖² of this rank's shards (METHOD §1, Algorithm 1 of arXiv 2502.15895).

    Args:
        views: all layers of the step, in their fixed order; shards may be empty, gradients absent (they count as zeros).
        kernels: how large layers are walked.
        with_previous: whether ⟨g, d_{t-1}⟩ is wanted; layers without ``previous`` keep 0 there.

    Returns:
        stats_LK: [L, 4] float64 on the shards' device.
    """
    if isinstance(kernels, NativeKernels):
        stats_LK = kernels.gradient_statistics(views, with_previous)
    else:
        stats_LK = _gradient_statistics(views, kernels, with_previous)
    scales = [view.grad_scale for view in views]
    if any(scale != 1.0 for scale in scales):
        scale_L = send(torch.tensor(scales, dtype=torch.float64), stats_LK.device)
        stats_LK[:, GRAD_DISPLACEMENT] *= scale_L
        stats_LK[:, GRAD_PREVIOUS] *= scale_L
        stats_LK[:, GRAD_SQ] *= scale_L**2
    return stats_LK


def _gradient_statistics(views: Sequence[ShardView], kernels: Kernels, with_previous: bool) -> torch.Tensor:
    """Large layers one by one, small ones in packs; without ``grad_scale``."""
    device = views[0].weight.device if views else torch.device("cpu")
    stats_LK = torch.zeros(len(views), GRADIENT_STATISTICS, dtype=torch.float64, device=device)
    views, rows, large, packs = _whole_rows(views, kernels.row_elements)
    looking_back = [row for row in large if with_previous and views[row].moments is not None]
    of_moments = [moments.factors for row in looking_back if (moments := views[row].moments) is not None]
    factors = dict(zip(looking_back, device_rows(of_moments, device), strict=True))
    for row in large:
        view = views[row]
        previous, moments = (view.previous, view.moments) if with_previous else (None, None)
        stats_LK[rows[row]] += kernels.gradient_products(
            view.grad, view.weight, view.reference, previous, view.projected, moments, factors.get(row)
        )
    for pack in packs:
        index = send(torch.tensor([rows[row] for row in pack.layers]), device)
        stats_LK.index_add_(0, index, _of_pack(pack, with_previous))
    return stats_LK


def _of_pack(pack: Pack, with_previous: bool) -> torch.Tensor:
    """Gradient statistics of a pack's layers, [layers of the pack, 4] float64."""
    grad, weight, reference = pack.gather("grad"), pack.gather("weight"), pack.gather("reference")
    assert weight is not None
    stats_LK = torch.zeros(len(pack.layers), GRADIENT_STATISTICS, dtype=torch.float64, device=weight.device)
    if grad is not None:
        grad = grad.float()
        stats_LK[:, GRAD_SQ] = pack.sums(grad, grad)
    if not pack.views[0].projected:
        return stats_LK
    now = displacement(weight, reference)
    stats_LK[:, DISPLACEMENT_SQ] = pack.sums(now, now)
    if grad is None:
        return stats_LK
    stats_LK[:, GRAD_DISPLACEMENT] = pack.sums(grad, now)
    previous = pack.previous(weight) if with_previous else None
    if previous is not None:
        stats_LK[:, GRAD_PREVIOUS] = pack.sums(grad, displacement(previous, reference))
    return stats_LK


def _whole_rows(
    views: Sequence[ShardView], row_elements: int
) -> tuple[Sequence[ShardView], Sequence[int], list[int], list[Pack]]:
    """``views`` with large ones cut to whole rows, and their rests behind; each one's layer; ``pack_small`` of them."""
    rows = list(range(len(views)))
    cut = list(views)
    large_elements = large_from(views[0].weight.device) if views else 0
    for row, view in enumerate(views):
        size = view.weight.numel()
        if size >= max(large_elements, 2 * row_elements) and size % row_elements:
            whole = size // row_elements * row_elements
            cut[row] = view.part(slice(0, whole), reference=True)
            cut.append(view.part(slice(whole, size), reference=True))
            rows.append(row)
    large, packs = pack_small(cut)
    return cut, rows, large, packs


def update_statistics(views: Sequence[ShardView], kernels: Kernels) -> torch.Tensor:
    """⟨u, d_t⟩ and ‖u‖² of this rank's shards, u = θ_new − θ_{t-1} being the optimizer's whole step.

    ``views`` hold the new weights, and in ``previous`` the ones before the step. Returns [L, 2] float64.
    """
    if isinstance(kernels, NativeKernels):
        return kernels.update_statistics(views)
    device = views[0].weight.device if views else torch.device("cpu")
    stats_LK = torch.zeros(len(views), UPDATE_STATISTICS, dtype=torch.float64, device=device)
    views, rows, large, packs = _whole_rows(views, kernels.row_elements)
    for row in large:
        view = views[row]
        if view.projected:
            assert view.previous is not None, f"{view.spec.name}: the weights before the step were not kept"
            stats_LK[rows[row]] += kernels.update_products(view.weight, view.previous, view.reference)
    for pack in packs:
        weight, previous = pack.gather("weight"), pack.gather("previous")
        if not pack.views[0].projected:
            continue
        assert weight is not None and previous is not None
        before = previous.float()
        update = weight.float() - before
        of_layers = [rows[row] for row in pack.layers]
        stats_LK[of_layers, UPDATE_DISPLACEMENT] += pack.sums(update, displacement(before, pack.gather("reference")))
        stats_LK[of_layers, UPDATE_SQ] += pack.sums(update, update)
    return stats_LK
