"""Sums over the rows of tensors whose shards may begin and end inside a row.

A tensor's rows follow dim 0; one of a single dimension is one row in all. Shards are intervals of the flattened tensor, so
only the rows at a shard's two ends can be cut, and what is missing of them lies on other ranks. Shapes: L layers, R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from digrap_scale.types import ShardSpec, ShardView

SEGMENT_ELEMENTS = 1 << 19  # 2 MiB of float32: what is worked on at a time

# Columns of what a rank tells the others of a layer: its cut rows (−1: none) with its share of their sums, and the
# largest sum of the rows that it holds whole.
FIRST_ROW, FIRST_SUM, LAST_ROW, LAST_SUM, LARGEST = range(5)
EDGES = 5


def row_elements(shape: Sequence[int]) -> int:
    """Elements of a row of a tensor of this shape (1 for one that has none)."""
    return max(1, math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape))


class RowSums:
    """One number for every row that this rank holds something of.

    Args:
        specs: this rank's shards, L of them.
        device: where they are.

    Attributes:
        sums: [rows] float64, all layers' one after the other: this rank's share, after ``join`` the sums of whole rows.
    """

    def __init__(self, specs: Sequence[ShardSpec], device: torch.device) -> None:
        self._lengths = [row_elements(spec.shape) for spec in specs]
        self._starts = [spec.start for spec in specs]
        firsts = [spec.start // length for spec, length in zip(specs, self._lengths, strict=True)]
        counts = [
            -(-spec.stop // length) - first if spec.numel else 0
            for spec, length, first in zip(specs, self._lengths, firsts, strict=True)
        ]
        self._slots = []  # of each layer's first row
        total = 0
        for first, count in zip(firsts, counts, strict=True):
            self._slots.append(total - first)
            total += count
        self.sums = torch.zeros(total, dtype=torch.float64, device=device)
        self._counts_L = torch.tensor(counts, device=device)
        # [L, 2]: the cut rows at both ends, −1 where there is none; a shard within one row has it at its beginning.
        rows = [
            self._cut(spec, length, first, first + count - 1)
            for spec, length, first, count in zip(specs, self._lengths, firsts, counts, strict=True)
        ]
        self._cut_L2 = torch.tensor(rows, dtype=torch.int64).reshape(len(specs), 2)
        self._is_cut_L2 = self._cut_L2 >= 0
        slots_L2 = self._cut_L2 + torch.tensor(self._slots, dtype=torch.int64).unsqueeze(1)
        self._cut_slots = slots_L2[self._is_cut_L2].to(device)

    @staticmethod
    def _cut(spec: ShardSpec, length: int, first: int, last: int) -> tuple[int, int]:
        if spec.numel == 0:
            return -1, -1
        begins, ends = spec.start % length != 0, spec.stop % length != 0
        if first == last:
            return (first if begins or ends else -1), -1
        return (first if begins else -1), (last if ends else -1)

    def segments(self, layer: int, view: ShardView) -> Iterator[tuple[slice, slice]]:
        """A view's elements in portions of whole rows, or of some of one row: (which elements, which of ``sums``)."""
        length, size = self._lengths[layer], view.weight.numel()
        begin, position = self._starts[layer] + view.offset, 0
        while position < size:
            row, inside = divmod(begin + position, length)
            whole = min(size - position, SEGMENT_ELEMENTS) // length
            if inside or whole == 0:
                taken, whole = min(length - inside, size - position, SEGMENT_ELEMENTS), 1
            else:
                taken = whole * length
            slot = self._slots[layer] + row
            yield slice(position, position + taken), slice(slot, slot + whole)
            position += taken

    def spread(self, numbers_L: torch.Tensor) -> torch.Tensor:
        """A number a layer, repeated for each of its rows here."""
        return numbers_L.to(self.sums.device).repeat_interleave(self._counts_L)

    def edges(self) -> torch.Tensor:
        """What the other ranks need of this one, [L, 5] float64 on the shards' device."""
        device = self.sums.device
        edges_LK = torch.zeros(len(self._lengths), EDGES, dtype=torch.float64, device=device)
        edges_LK[:, [FIRST_ROW, LAST_ROW]] = self._cut_L2.double().to(device)
        shares_L2 = torch.zeros(len(self._lengths), 2, dtype=torch.float64, device=device)
        shares_L2[self._is_cut_L2.to(device)] = self.sums[self._cut_slots]
        edges_LK[:, [FIRST_SUM, LAST_SUM]] = shares_L2
        whole = self.sums.clone()
        whole[self._cut_slots] = 0.0
        edges_LK[:, LARGEST] = torch.segment_reduce(whole, "max", lengths=self._counts_L, initial=0.0)
        return edges_LK

    def join(self, edges_RLK: torch.Tensor) -> torch.Tensor:
        """Complete the cut rows' sums from all ranks' ``edges`` (CPU); the largest sum of each layer, [L] float64."""
        rows_RL2 = edges_RLK[..., [FIRST_ROW, LAST_ROW]].long()
        shares_RL2 = edges_RLK[..., [FIRST_SUM, LAST_SUM]]
        largest_L = edges_RLK[..., LARGEST].amax(0)
        stride = int(rows_RL2.max()) + 1  # a key for each row of each layer
        if stride == 0:
            return largest_L
        layers_L2 = torch.arange(len(largest_L)).unsqueeze(1).expand(-1, 2)
        is_cut = rows_RL2 >= 0
        keys, place = torch.unique((layers_L2 * stride + rows_RL2)[is_cut], return_inverse=True)
        totals = torch.zeros(len(keys), dtype=torch.float64).index_add_(0, place, shares_RL2[is_cut])
        mine = (layers_L2 * stride + self._cut_L2)[self._is_cut_L2]
        self.sums[self._cut_slots] = totals[torch.searchsorted(keys, mine)].to(self.sums.device)
        return largest_L.scatter_reduce_(0, keys // stride, totals, "amax")
