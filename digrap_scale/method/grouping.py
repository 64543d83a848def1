"""Layers that share one ω: their inner products are those of the longer vector that they are together. Shapes: L layers."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from digrap_scale.config.method_checks import BLOCK_PATTERN as BLOCK_PATTERN
from digrap_scale.errors import ConfigError

GROUPINGS = ("tensor", "module", "block")


class Grouping:
    """Which layers belong together.

    Args:
        names: the layers' names.
        projected_L: [L] bool, layers that have a reference; the others belong to no group.
        kind: ``tensor`` (each by itself), ``module`` (weight and bias of one module), or ``block``: those whose names
            have the same match of ``pattern``; a name without a match is by itself.
        pattern: regex.

    Raises:
        ConfigError: ``pattern`` matches no layer that has a reference.
    """

    def __init__(self, names: Sequence[str], projected_L: torch.Tensor, kind: str, pattern: str) -> None:
        self._projected_L = projected_L
        keys: list[str] = [str(layer) for layer in range(len(projected_L))]
        if kind == "module":
            keys = [name.rpartition(".")[0] for name in names]
        elif kind == "block":
            matches = [re.search(pattern, name) for name in names]
            found = [match is not None and on for match, on in zip(matches, projected_L.tolist(), strict=True)]
            if not any(found):
                shown = f", such as {names[0]!r}" if names else ""
                raise ConfigError(f"method.block_pattern: {pattern!r} matches none of {len(names)} layers{shown}")
            # A match is told from a whole name by what follows it.
            keys = [name if match is None else f"{match[0]}…" for name, match in zip(names, matches, strict=True)]
        numbers: dict[str, int] = {}
        of_L = [numbers.setdefault(key, len(numbers)) for key in keys]
        self._of_L = torch.tensor(of_L, dtype=torch.int64)
        self._count = len(numbers)
        on = projected_L.tolist()
        first = {group: layer for layer, group in reversed(list(enumerate(of_L))) if on[layer]}
        # [L] bool: one layer of each group, where groups are to be counted and not layers.
        self.counted_L = torch.tensor([first.get(group) == layer for layer, group in enumerate(of_L)], dtype=torch.bool)

    def sums(self, values_L: torch.Tensor) -> torch.Tensor:
        """[L] float64: for each layer the sum over its group, of layers that have a reference."""
        values_L = torch.where(self._projected_L, values_L, torch.zeros_like(values_L))
        return torch.zeros(self._count, dtype=values_L.dtype).index_add_(0, self._of_L, values_L)[self._of_L]
