"""What every task shares: labels, pixels, and the three things that training and evaluation ask of it."""

# B samples of a batch, C classes, H × W pixels

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from digrap_scale.data.augment import random_resized_crop
from digrap_scale.errors import ConfigError
from digrap_scale.types import Batch


class Task(ABC):
    """Collates samples, and calls the model once, at its root, for a loss or for logits.

    Attributes:
        class_names: names of the classes, in the order of the logits' columns; empty for a task without classes.
    """

    def __init__(
        self, processor: Any, *, class_names: Sequence[str], label_field: str, crop: bool, dtype: torch.dtype
    ) -> None:
        self.processor = processor
        self.class_names = list(class_names)
        self.label_field = label_field
        self.crop = crop
        self.dtype = dtype
        self._index = {name: index for index, name in enumerate(self.class_names)}

    @abstractmethod
    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Samples (of ``decode_sample``, with a ``seed``) → batch with labels [B] int64.

        Raises:
            ConfigError: a sample without its label or caption, or with an unknown label; names shard and key.
        """

    def micro_batch(self, samples: list[dict[str, Any]]) -> Batch:
        """The batch of a micro-batch's samples; of a task with a budget for a forward maybe only the first of them, and the
        others in ``rest``. Raises: ConfigError: see ``collate``."""
        return self.collate(samples)

    def padding(self, sample: dict[str, Any]) -> Batch:
        """A batch of the shape of ``sample``'s that counts nowhere: labels −1, no keys; its loss is 0."""
        return self.emptied(self.collate([sample]))

    def emptied(self, batch: Batch) -> Batch:
        """``batch``, so that it counts nowhere: see ``padding``."""
        assert batch.labels is not None  # every task's collate gives labels
        return Batch(batch.inputs, torch.full_like(batch.labels, -1), [])

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Mean loss over the batch's samples with a label ≥ 0: a float32 scalar with a graph."""

    @abstractmethod
    def logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """[B, C] float32: a score for each class."""

    def pixels(self, samples: list[dict[str, Any]]) -> torch.Tensor:
        """[B, 3, H, W] through the model's image processor, in the dtype of the model's weights."""
        images = [only_image(sample) for sample in samples]
        if self.crop:
            images = [random_resized_crop(image, s["seed"]) for image, s in zip(images, samples, strict=True)]
        try:
            pixel_values = self.processor(images=images, return_tensors="pt")["pixel_values"]
        except ValueError as error:
            first = f"{samples[0]['shard']}: sample {samples[0]['key']}"
            line = " ".join(str(error).split())
            raise ConfigError(f"{first} and {len(samples) - 1} more: the image processor failed: {line}") from error
        return pixel_values.to(self.dtype)

    def labels(self, samples: list[dict[str, Any]]) -> torch.Tensor:
        """[B] int64 class indices."""
        return torch.tensor([self._label(sample) for sample in samples], dtype=torch.int64)

    def _label(self, sample: dict[str, Any]) -> int:
        name = text_field(sample, self.label_field, "data.label_field")
        if name not in self._index:
            raise unknown_label(sample, name, self.class_names)
        return self._index[name]


def unknown_label(sample: dict[str, Any], name: str, class_names: Sequence[str]) -> ConfigError:
    """The error of a label that is no class."""
    near = difflib.get_close_matches(name, class_names, n=1, cutoff=0)
    return ConfigError(
        f"{sample['shard']}: sample {sample['key']}: label {name!r} is not among the {len(class_names)} names of data.classes "
        f"(nearest: {', '.join(near)})"
    )


def mean_cross_entropy(logits_BC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over labels ≥ 0; labels of −1 do not count, and without any other the loss is 0, not NaN."""
    total = functional.cross_entropy(logits_BC, labels_B, ignore_index=-1, reduction="sum")
    return total / (labels_B >= 0).sum().clamp(min=1)


def only_image(sample: dict[str, Any]) -> Any:
    """The image of a sample that has exactly one.

    Raises:
        ConfigError: it has none, or several; names shard and key.
    """
    if len(sample["images"]) != 1:
        found = len(sample["images"]) or "none"
        raise ConfigError(f"{sample['shard']}: sample {sample['key']}: expected one image, found {found}")
    return sample["images"][0]


def text_field(sample: dict[str, Any], field: str, option: str) -> str:
    """A text of a sample's JSON.

    Raises:
        ConfigError: it is missing or not a text; names shard, key, field and the option that chose the field.
    """
    value = sample["meta"].get(field)
    if not isinstance(value, str) or not value:
        raise _unfit(sample, field, option, "a text")
    return value


def texts_field(sample: dict[str, Any], field: str, option: str) -> list[str]:
    """A list of texts of a sample's JSON. Some may be blank, not all: in benchmarks' files an annotator sometimes said nothing.

    Raises:
        ConfigError: it is missing, empty or something else; names shard, key, field and the option that chose the field.
    """
    value = sample["meta"].get(field)
    texts = isinstance(value, list) and all(isinstance(one, str) for one in value)
    if not texts or not any(one.strip() for one in value):
        raise _unfit(sample, field, option, "a list of one or more texts")
    return list(value)


def _unfit(sample: dict[str, Any], field: str, option: str, expected: str) -> ConfigError:
    where = f"{sample['shard']}: sample {sample['key']}: JSON field {field!r} ({option})"
    there = ", ".join(sample["meta"]) or "none"
    found = f"is {sample['meta'][field]!r}" if field in sample["meta"] else f"is missing (there are: {there})"
    return ConfigError(f"{where} {found}; expected {expected}")
