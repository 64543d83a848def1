"""Statistics that are taken while backward runs: a layer's, as soon as its gradient is there.

They leave the step's critical path, and read the gradient while it is still in a cache. Shapes: L layers, K statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from digrap_scale.method.kernels import large_from
from digrap_scale.method.statistics import GRADIENT_STATISTICS
from digrap_scale.sharding.base import Backend

SAMPLED_ELEMENTS = 64  # each is a cache miss in the step


class EarlyStatistics:
    """Large layers' statistics, kept until the step; small ones are cheaper together, in the step.

    A layer whose gradient or weight was written to since (clipping, unscaling, a reduction of the user's own) does not
    count: its step measures it again. Version counters tell most writes; some (GradScaler's unscaling, collectives) do
    not count themselves, so a sample of the gradient's elements is compared as well. A sample of zeros (an embedding's rows
    that no token touched) tells nothing, and does not count either.

    Args:
        backend: tells when a layer's gradient is there.
        measure: gives the statistics [1, K] of one layer.

    Attributes:
        active: off while a backward runs that is not the last one before the optimizer's step: nothing is measured.

    Raises:
        ConfigError: the backend cannot tell when a gradient is there.
    """

    def __init__(self, backend: Backend, measure: Callable[[int], torch.Tensor]) -> None:
        layers = len(backend.specs)
        self.active = True
        self._backend = backend
        self._measure = measure
        device = backend.weights()[0].device
        self._large_L = [spec.numel >= large_from(device) for spec in backend.specs]
        self._stats_LK = torch.zeros(layers, GRADIENT_STATISTICS, dtype=torch.float64, device=device)
        self._stamps: dict[int, Hashable] = {}
        self._buffers: dict[int, int] = {}  # memory of gradients → writes to it when the last of its layers was there
        self._samples_LN = torch.zeros(layers, SAMPLED_ELEMENTS, device=device)
        self._taken: Any = None
        self._handles = backend.watch_gradients(self._gradient_is_there)

    @torch.no_grad()
    def _gradient_is_there(self, layer: int) -> None:
        self._stamps.pop(layer, None)
        memory, writes = self._backend.buffer_writes(layer)
        self._buffers[memory] = writes
        if not self.active or not self._large_L[layer]:
            return
        self._stats_LK[layer] = self._measure(layer)[0]
        self._stamps[layer] = self._backend.stamp(layer)
        self._samples_LN[layer] = self._samples([layer])[0]
        if self._stats_LK.device.type != "cpu":
            # The hook may run on another stream than the step (FSDP2 reduces gradients on one of its own).
            self._taken = torch.accelerator.current_stream().record_event()

    def _samples(self, layers: Sequence[int]) -> torch.Tensor:
        """[len(layers), SAMPLED_ELEMENTS] float32: elements of each layer's gradient, far apart; zeros after the last."""
        rows = torch.zeros(len(layers), SAMPLED_ELEMENTS, device=self._samples_LN.device)
        for row, view in zip(rows.unbind(), self._backend.views(layers), strict=True):
            assert view.grad is not None
            sample = view.grad[:: max(1, view.grad.numel() // SAMPLED_ELEMENTS)][:SAMPLED_ELEMENTS]
            row[: sample.numel()].copy_(sample)
        return rows

    def ready(self) -> list[int]:
        """The layers whose statistics hold."""
        stamp = self._backend.stamp
        layers = [layer for layer, then in self._stamps.items() if stamp(layer) == then and self._unwritten(layer)]
        if not layers:
            return []
        self._wait()
        now_LN = self._samples(layers)
        # Not equal to itself: NaN. Such a layer is measured again.
        same_L = ((now_LN == self._samples_LN[layers]).all(1) & now_LN.any(1)).tolist()
        return [layer for layer, same in zip(layers, same_L, strict=True) if same]

    def _unwritten(self, layer: int) -> bool:
        memory, writes = self._backend.buffer_writes(layer)
        return self._buffers.get(memory) == writes

    def _wait(self) -> None:
        """On accelerators: the step's stream waits for what the hooks have launched."""
        if self._taken is not None:
            torch.accelerator.current_stream().wait_event(self._taken)
            self._taken = None

    def take(self, layers: Sequence[int]) -> torch.Tensor:
        """Their rows [len(layers), K], once; the next step's are measured anew."""
        self._wait()
        self._stamps, self._buffers = {}, {}
        return self._stats_LK[list(layers)]

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
