"""Contrastive tasks for models with an image and a text tower: ``logits_per_image`` [B, C].

Source: Radford et al. 2021, arXiv 2103.00020. The captions that a batch is told apart from are those of the same
forward on the same rank; nothing is gathered over ranks.
"""

# B samples of a batch, C classes, U unique captions of a batch, T tokens

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from digrap_scale.data.tasks.base import Task, mean_cross_entropy, text_field
from digrap_scale.types import Batch

Tokenize = Callable[[Sequence[str]], dict[str, torch.Tensor]]


class ContrastiveLabelTask(Task):
    """Tells classes apart by their prompts: cross entropy of ``logits_per_image`` over the class prompts."""

    def __init__(self, processor: Any, *, tokens: dict[str, torch.Tensor], **common: Any) -> None:
        """``tokens``: the tokenised class prompts, ``input_ids`` [C, T] and maybe ``attention_mask`` [C, T]."""
        super().__init__(processor, **common)
        self.tokens = tokens

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """``pixel_values`` [B, 3, H, W], the prompts' tokens [C, T], labels [B]; see ``Task.collate``."""
        inputs = {**self.tokens, "pixel_values": self.pixels(samples)}
        return Batch(inputs, self.labels(samples), [sample["key"] for sample in samples])

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Mean cross entropy; labels of −1 do not count."""
        assert batch.labels is not None
        return mean_cross_entropy(self.logits(model, batch), batch.labels)

    def logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """[B, C] float32."""
        return model(**batch.inputs).logits_per_image.float()


class ContrastiveCaptionTask(Task):
    """Tells a batch's captions apart: symmetric InfoNCE in which equal captions are one positive."""

    def __init__(self, processor: Any, *, tokenize: Tokenize, caption_field: str, **common: Any) -> None:
        super().__init__(processor, **common)
        self.tokenize = tokenize
        self.caption_field = caption_field

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """``pixel_values`` [B, 3, H, W], the unique captions' tokens [U, T], labels [B] = caption numbers."""
        captions = [text_field(sample, self.caption_field, "data.caption_field") for sample in samples]
        unique = {caption: index for index, caption in enumerate(dict.fromkeys(captions))}
        inputs = {**self.tokenize(list(unique)), "pixel_values": self.pixels(samples)}
        labels = torch.tensor([unique[caption] for caption in captions], dtype=torch.int64)
        return Batch(inputs, labels, [sample["key"] for sample in samples])

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """½ · (image → caption + caption → image); a caption's target is spread evenly over its images."""
        assert batch.labels is not None
        logits_BU = self.logits(model, batch)
        if not batch.keys:
            return logits_BU.sum() * 0  # padding: this rank only joins the others' collectives
        positives_UB = functional.one_hot(batch.labels, logits_BU.shape[1]).T.to(logits_BU.dtype)
        targets_UB = positives_UB / positives_UB.sum(dim=1, keepdim=True)
        image_loss = functional.cross_entropy(logits_BU, batch.labels)
        return (image_loss + functional.cross_entropy(logits_BU.T, targets_UB)) / 2

    def logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """[B, U] float32: a score for each unique caption of the batch."""
        return model(**batch.inputs).logits_per_image.float()
