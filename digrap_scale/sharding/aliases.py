"""Flat views that stay from step to step: to make them anew for each of thousands of layers is most of such a step's cost."""

# N local elements

from __future__ import annotations

import torch
from torch.optim import Optimizer


class Aliases:
    """[N] views of long-lived tensors (weights, an optimizer's state), made again when the tensor or its memory is another.

    Only of memory on the CPU: a view keeps memory alive that its owner has let go of (``tensor.data = …``), until it is asked
    for again; on accelerators that memory is what an offload is for, and launches cost more than views there.

    Args:
        optimizer: when its state is loaded, all views are let go of.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._known: dict[tuple[str, int], tuple[torch.Tensor, int, int, torch.Tensor]] = {}
        self._handle = optimizer.register_load_state_dict_post_hook(lambda _: self._known.clear())

    def flat(
        self, what: str, layer: int, tensor: torch.Tensor, part: tuple[int, int] | None = None
    ) -> torch.Tensor | None:
        """A view of ``tensor``'s memory as one dimension; None where that is not contiguous.

        Args:
            what, layer: the view's place here; another tensor takes it over.
            tensor: a plain one, this rank's own.
            part: first element and number of elements of what is wanted (all by default).
        """
        if not tensor.is_contiguous():
            return None
        known, address, elements = self._known.get((what, layer)), tensor.data_ptr(), tensor.numel()
        if known is not None and known[0] is tensor and known[1] == address and known[2] == elements:
            return known[3]
        flat = tensor.detach().view(-1)
        if part is not None:
            flat = flat.narrow(0, *part)
        if tensor.device.type == "cpu":
            self._known[what, layer] = (tensor, address, elements, flat)
        return flat

    def close(self) -> None:
        """Let go of all views, and of the optimizer."""
        self._known.clear()
        self._handle.remove()
