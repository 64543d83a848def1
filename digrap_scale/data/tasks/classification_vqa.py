"""Image classification put as a question: the class's name is the answer."""

# B samples of a batch, C classes, R rows (the samples, and maybe a blank one), P tokens of the prompts, A of an answer

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from digrap_scale.data.augment import random_resized_crop
from digrap_scale.data.tasks.base import Task, only_image, text_field
from digrap_scale.data.tasks.vqa import Encoder, VqaTask
from digrap_scale.types import IGNORED, Batch


class ClassificationVqaTask(VqaTask):
    """One question for all samples. Training: as ``VqaTask``, towards the class's name.

    Evaluation: generated answers, compared with the name after normalisation; or the class whose name, with the end of the
    answer, is most likely (then the task has ``logits``, and counts as any other classification).
    """

    def __init__(self, encoder: Encoder, *, class_question: str, likelihood: bool, **common: Any) -> None:
        """
        Args:
            class_question: what every class is an answer to.
            likelihood: compare classes by likelihood instead of generating.
        """
        super().__init__(encoder, **common)
        self.class_question = class_question
        self.generates = not likelihood
        asked = self.prompt.replace("{question}", class_question)
        self._continuations = [encoder.continuation(asked, 1, name) for name in self.class_names]

    def question(self, sample: dict[str, Any]) -> str:
        return self.prompt.replace("{question}", self.class_question)

    def answers(self, sample: dict[str, Any]) -> list[str]:
        return [self.class_names[self._label(sample)]]

    def group(self, sample: dict[str, Any]) -> str:
        return text_field(sample, self.label_field, "data.label_field")

    def labels(self, samples: list[dict[str, Any]]) -> torch.Tensor:
        return Task.labels(self, samples)

    def target(self, sample: dict[str, Any], answers: Sequence[str]) -> str:
        return answers[0]

    def images(self, sample: dict[str, Any]) -> list[Any]:
        image = only_image(sample)
        return [random_resized_crop(image, sample["seed"])] if self.crop else [image]

    def logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """[B, C] float32: log p(name and end of the answer | image, question); a forward for each class."""
        assert batch.labels is not None
        columns = []
        for continuation in self._continuations:
            inputs, labels = _continued(batch.inputs, continuation)
            likelihood_R, _ = self.log_likelihood(model, inputs, labels)
            columns.append(likelihood_R[: len(batch.labels)])
        return torch.stack(columns, dim=1)


def _continued(
    inputs: dict[str, torch.Tensor], continuation: dict[str, list[int]]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Right-padded prompts [R, P] with the same answer behind each: inputs and labels, [R, P + A]."""
    lengths_R = inputs["attention_mask"].sum(dim=1)
    added = len(continuation["input_ids"])
    places_RA = lengths_R[:, None] + torch.arange(added, device=lengths_R.device)
    longer = dict(inputs)
    for name, values in continuation.items():
        if name in inputs:
            tokens = inputs[name]
            wide = torch.cat([tokens, tokens.new_zeros(len(tokens), added)], dim=1)
            longer[name] = wide.scatter(1, places_RA, tokens.new_tensor(values).expand(len(tokens), -1))
    ids = longer["input_ids"]
    labels = torch.full_like(ids, IGNORED).scatter(1, places_RA, ids.gather(1, places_RA))
    return longer, labels
