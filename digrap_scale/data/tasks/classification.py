"""Image classification: one logit a class, cross entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from digrap_scale.data.tasks.base import Task, mean_cross_entropy
from digrap_scale.types import Batch


class ClassificationTask(Task):
    """``model(pixel_values=…).logits`` [B, C] against the class indices."""

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """``pixel_values`` [B, 3, H, W] and labels [B]; see ``Task.collate``."""
        return Batch({"pixel_values": self.pixels(samples)}, self.labels(samples), [s["key"] for s in samples])

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Mean cross entropy; labels of −1 do not count."""
        assert batch.labels is not None
        return mean_cross_entropy(self.logits(model, batch), batch.labels)

    def logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """[B, C] float32."""
        return model(**batch.inputs).logits.float()
