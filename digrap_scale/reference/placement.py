"""Where a rank's part of θ₀ lives: in memory as long as training runs, or in its file, read piece by piece in each step.

Shapes: L layers, N local elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch


class Piece(NamedTuple):
    """Some of the elements that this rank holds of one layer, and their reference.

    Attributes:
        layer: the layer's number.
        part: which of the rank's N elements; ``slice(None)``: all.
        reference: [elements of ``part``], or None: zero or absent.
    """

    layer: int
    part: slice
    reference: torch.Tensor | None


class ReferenceShards(Protocol):
    """θ₀ of this rank's shards, as the projector walks it."""

    name: str

    def pieces(self, layers: Sequence[int]) -> Iterator[list[Piece]]:
        """The layers in order, in portions; a portion's tensors are valid until the next one is asked for."""

    def is_zero(self, layer: int) -> bool:
        """Whether nothing is held or read for the layer: its reference is zero, or absent."""

    def prefetch(self) -> None:
        """Begin to read what a walk over all layers asks for first."""

    def held_tensors(self) -> list[torch.Tensor]:
        """What stays in memory between steps."""

    def close(self) -> None:
        """Let go of threads and files."""


class HeldReference:
    """Slices that stay in memory, beside the weights or in host memory; one portion holds all layers."""

    def __init__(self, slices_L: Sequence[torch.Tensor | None], name: str) -> None:
        self.name = name
        self.slices_L = list(slices_L)
        self._pieces_L = [Piece(layer, slice(None), tensor) for layer, tensor in enumerate(slices_L)]

    def pieces(self, layers: Sequence[int]) -> Iterator[list[Piece]]:
        yield [self._pieces_L[layer] for layer in layers]

    def is_zero(self, layer: int) -> bool:
        return self.slices_L[layer] is None

    def prefetch(self) -> None:
        """Nothing to read."""

    def held_tensors(self) -> list[torch.Tensor]:
        return [tensor for tensor in self.slices_L if tensor is not None]

    def close(self) -> None:
        """Nothing to let go of."""
