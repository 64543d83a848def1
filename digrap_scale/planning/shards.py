"""Which elements of each weight a rank holds, by each backend's own rule, and how many it sets memory aside for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from digrap_scale.planning.weights import Weight

_ZERO_ALIGNMENT = 2  # DeepSpeed's nccl_start_alignment_factor: flat buffers are whole multiples of it on every rank


@dataclass(frozen=True)
class Held:
    """Elements of one weight that a rank holds, and that it sets memory aside for (padding included)."""

    real: int
    padded: int


def rows_of(weight: Weight, ranks: int, rank: int) -> Held:
    """FSDP2: runs of ceil(rows / ranks) rows, the last short or empty but padded. 0-d weights stay whole."""
    if not weight.shape:
        return Held(1, 1)
    rows = weight.shape[0]
    row = weight.numel // rows if rows else 0
    run = math.ceil(rows / ranks)
    first = min(rank * run, rows)
    return Held((min(first + run, rows) - first) * row, run * row)


def pieces_of(weight: Weight, ranks: int, rank: int) -> Held:
    """ZeRO-3: equal pieces of ceil(elements / ranks), the last padded."""
    size = math.ceil(weight.numel / ranks)
    start = min(rank * size, weight.numel)
    return Held(min(size, weight.numel - start), size)


def flat_size(weights: Sequence[Weight], ranks: int) -> int:
    """ZeRO-1 and 2: elements of one group's flat buffer, padding included."""
    step = _ZERO_ALIGNMENT * ranks
    return math.ceil(sum(weight.numel for weight in weights) / step) * step


def flat_parts(weights: Sequence[Weight], ranks: int, rank: int) -> list[int]:
    """ZeRO-1 and 2: of one group's weights, laid end to end, the elements in this rank's equal part."""
    size = flat_size(weights, ranks) // ranks
    first, last = rank * size, (rank + 1) * size
    found, offset = [], 0
    for weight in weights:
        found.append(max(0, min(offset + weight.numel, last) - max(offset, first)))
        offset += weight.numel
    return found
