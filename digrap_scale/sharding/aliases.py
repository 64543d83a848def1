"""Flat views that stay from step to step: to make them anew for each of thousands of layers is most of such a step's cost."""

# N local elements

from __future__ import annotations

import torch


class Aliases:
    """[N] views of long-lived tensors (weights, an optimizer's state), made again when the tensor or its memory is another."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], tuple[torch.Tensor, int, torch.Tensor]] = {}

    def flat(
        self, what: str, layer: int, tensor: torch.Tensor, part: tuple[int, int] | None = None
    ) -> torch.Tensor | None:
        """A view of ``tensor``'s memory as one dimension; None where that is not contiguous.

        Args:
            what, layer: the view's place here; another tensor takes it over.
            tensor: a plain one, this rank's own.
            part: first element and number of elements of what is wanted (all by default).
        """
        known, address = self._known.get((what, layer)), tensor.data_ptr()
        if known is not None and known[0] is tensor and known[1] == address:
            return known[2]
        if not tensor.is_contiguous():
            return None
        flat = tensor.detach().view(-1)
        if part is not None:
            flat = flat.narrow(0, *part)
        self._known[what, layer] = (tensor, address, flat)
        return flat

    def forget(self) -> None:
        """Let go of all: what is replaced must not stay in memory for this."""
        self._known.clear()
