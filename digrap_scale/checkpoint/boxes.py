"""A flat interval of a tensor as boxes: what torch.distributed.checkpoint stores, from what sharded optimizers hold.

ZeRO cuts flattened tensors anywhere. An interval of a tensor of n dimensions is at most 2n − 1 boxes: the rest of a row,
whole rows, the beginning of a row, and so on inwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A box of a tensor, contiguous in its flattened form.

    Attributes:
        offsets: of its first element, a number a dimension.
        sizes: its extent.
        start: where it begins in the flattened tensor.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        """Its elements."""
        return math.prod(self.sizes)


def boxes_of(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Elements [start, stop) of the flattened (C order) tensor of ``shape``, as boxes in their order."""
    if start >= stop:
        return []
    return _boxes(tuple(shape), start, stop, (), 0)


def _boxes(shape: tuple[int, ...], start: int, stop: int, prefix: tuple[int, ...], base: int) -> list[Box]:
    """``start`` and ``stop`` count within the sub-tensor at ``prefix``, which begins at ``base`` of the whole."""
    ones = (1,) * len(prefix)
    if not shape:
        return [Box(prefix, ones, base)]
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner
    found: list[Box] = []
    if start < first * inner:  # begins within a row
        row = first - 1
        end = min(stop, first * inner)
        found += _boxes(shape[1:], start - row * inner, end - row * inner, (*prefix, row), base + row * inner)
    if first < last:
        zeros = (0,) * (len(shape) - 1)
        found.append(Box((*prefix, first, *zeros), (*ones, last - first, *shape[1:]), base + first * inner))
    if last * inner < stop and last >= first:  # ends within another
        found += _boxes(shape[1:], 0, stop - last * inner, (*prefix, last), base + last * inner)
    return found
