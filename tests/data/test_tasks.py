"""Tasks on small models: what a batch holds, and that training on it lowers the loss."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import ViTImageProcessorPil

from digrap_scale.data.augment import random_resized_crop
from digrap_scale.data.shards import ShardSet, write_shards
from digrap_scale.data.tasks.build import build_task
from digrap_scale.data.tasks.contrastive import ContrastiveCaptionTask
from digrap_scale.errors import ConfigError
from digrap_scale.models.build import build_model
from digrap_scale.types import Batch
from tests.data.samples import SquareProcessor, encoded, open_loader
from tests.models import tiny

COLORS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Shards of red, green and blue squares, and their classes file."""
    folder = tmp_path_factory.mktemp("data")
    samples = [
        {
            "key": f"s{i}",
            "image": encoded(COLORS[name], size=16),
            "extension": "png",
            "meta": {"label": name, "caption": tiny.CLASSES[name]},
        }
        for i, name in enumerate(list(COLORS) * 6)
    ]
    write_shards(samples, folder, prefix="train", samples_per_shard=7)
    (folder / "classes.json").write_text(json.dumps(tiny.CLASSES))
    return {"train": [f"{folder}/train-*.tar"], "classes": f"{folder}/classes.json"}


def loader(data: dict[str, Any], task: Any, train: bool, batch_samples: int = 6) -> Any:
    options = {"rank": 0, "world_size": 1, "workers": 0, "seed": 0, "shuffle_buffer_samples": 18}
    return open_loader(ShardSet.open(data["train"]), task, train, batch_samples=batch_samples, **options)


@pytest.mark.parametrize("save", [tiny.save_vit, tiny.save_resnet, tiny.save_lite])
@pytest.mark.parametrize("augment", ["none", "crop"])
def test_classification_learns(tmp_path: Path, data: dict[str, Any], save: Any, augment: str) -> None:
    config = tiny.make_config(save(tmp_path), "classification", data={**data, "augment": augment})
    learn(config, data, steps=30, classes=3)


@pytest.mark.parametrize("save", [tiny.save_clip, tiny.save_siglip, tiny.save_dual_encoder])
@pytest.mark.parametrize("target", ["label", "caption"])
def test_contrastive_learns(tmp_path: Path, data: dict[str, Any], save: Any, target: str) -> None:
    config = tiny.make_config(save(tmp_path), "contrastive", data={**data, "target": target})
    learn(config, data, steps=30, classes=None)


def learn(config: Any, data: dict[str, Any], steps: int, classes: int | None) -> None:
    """Trains a few steps; the loss falls, and evaluation gets better than chance."""
    torch.manual_seed(0)
    built = build_model(config, classes)
    model = built.model.train()
    task = build_task(config, built.processor, built.tokenizer, train=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for batch in islice(loader(data, task, True), steps):
        assert batch.inputs["pixel_values"].shape == (6, 3, 16, 16)
        loss = task.loss(model, batch)
        assert loss.shape == () and loss.dtype == torch.float32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    evaluation = build_task(config, built.processor, built.tokenizer, train=False)
    assert evaluation.class_names == list(COLORS)
    model.eval()
    right = 0
    with torch.no_grad():
        for batch in loader(data, evaluation, False, batch_samples=4):
            logits = evaluation.logits(model, batch)
            assert logits.shape == (len(batch.labels), 3) and logits.dtype == torch.float32
            right += int((logits.argmax(1) == batch.labels).sum())
    assert right >= 12


def test_bfloat16_weights_get_bfloat16_pixels(tmp_path: Path, data: dict[str, Any]) -> None:
    config = tiny.make_config(tiny.save_resnet(tmp_path), "classification", data=data, dtype="bfloat16")
    built = build_model(config, 3)
    task = build_task(config, built.processor, None, train=True)
    batch = next(iter(loader(data, task, True)))
    assert batch.inputs["pixel_values"].dtype == torch.bfloat16
    assert task.loss(built.model, batch).dtype == torch.float32


def test_labels_of_minus_one_do_not_count(tmp_path: Path, data: dict[str, Any]) -> None:
    config = tiny.make_config(tiny.save_vit(tmp_path), "classification", data=data)
    built = build_model(config, 3)
    task = build_task(config, built.processor, None, train=False)
    batch = next(iter(loader(data, task, False, batch_samples=4)))
    masked = Batch(batch.inputs, torch.tensor([int(batch.labels[0]), -1, -1, -1]), batch.keys)
    first = Batch({"pixel_values": batch.inputs["pixel_values"][:1]}, batch.labels[:1], batch.keys[:1])
    model = built.model.eval()
    assert torch.allclose(task.loss(model, masked), task.loss(model, first), atol=1e-6)


class FixedLogits(nn.Module):
    """Gives ``logits_per_image`` whatever comes in."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.table, self.calls = logits, 0

    def forward(self, **inputs: torch.Tensor) -> Any:
        self.calls += 1
        return type("Output", (), {"logits_per_image": self.table})()


def test_equal_captions_are_one_positive() -> None:
    def tokenize(texts: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros(len(texts), 1, dtype=torch.int64)}

    task = ContrastiveCaptionTask(
        SquareProcessor(),
        tokenize=tokenize,
        caption_field="caption",
        class_names=(),
        label_field="label",
        crop=False,
        dtype=torch.float32,
    )
    image = Image.new("RGB", (8, 8))
    samples = [
        {"key": str(i), "shard": "x", "images": [image], "seed": 0, "meta": {"caption": caption}}
        for i, caption in enumerate(["cat", "dog", "cat"])
    ]
    batch = task.collate(samples)
    assert batch.labels.tolist() == [0, 1, 0] and batch.inputs["input_ids"].shape == (2, 1)
    logits = torch.tensor([[2.0, 0.0], [0.5, 1.0], [1.0, -1.0]])
    model = FixedLogits(logits)
    right = (2.0, 1.0, 1.0)
    per_image = [math.log(sum(math.exp(x) for x in row)) - own for row, own in zip(logits.tolist(), right, strict=True)]
    cat, dog = ([row[column] for row in logits.tolist()] for column in (0, 1))
    log_cat, log_dog = (math.log(sum(math.exp(x) for x in column)) for column in (cat, dog))
    per_text = [log_cat - (cat[0] + cat[2]) / 2, log_dog - dog[1]]
    expected = (sum(per_image) / 3 + sum(per_text) / 2) / 2
    assert task.loss(model, batch).item() == pytest.approx(expected, abs=1e-6)
    assert model.calls == 1


def test_siglip_prompts_are_padded_to_full_length(tmp_path: Path, data: dict[str, Any]) -> None:
    for save, length in ((tiny.save_siglip, 8), (tiny.save_clip, 7)):
        folder = save(tmp_path / save.__name__)
        config = tiny.make_config(folder, "contrastive", data=data)
        built = build_model(config, None)
        task = build_task(config, built.processor, built.tokenizer, train=False)
        batch = next(iter(loader(data, task, False)))
        assert batch.inputs["input_ids"].shape == (3, length)


def test_long_captions_are_cut(tmp_path: Path, data: dict[str, Any]) -> None:
    config = tiny.make_config(tiny.save_clip(tmp_path), "contrastive", data={**data, "target": "caption"})
    built = build_model(config, None)
    task = build_task(config, built.processor, built.tokenizer, train=True)
    sample = {"key": "k", "shard": "x", "images": [Image.new("RGB", (8, 8))], "seed": 0}
    batch = task.collate([{**sample, "meta": {"caption": "a red thing " * 20}}])
    assert batch.inputs["input_ids"].shape == (1, 8)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"label": "rde"}, "label 'rde' is not among the 3 names of data.classes (nearest: red)"),
        ({"label": 3}, "JSON field 'label' (data.label_field) is 3; expected a text"),
        ({"name": "red"}, "is missing (there are: name)"),
    ],
)
def test_bad_labels_are_named(tmp_path: Path, data: dict[str, Any], meta: dict, message: str) -> None:
    config = tiny.make_config(tmp_path, "classification", data=data)
    task = build_task(config, SquareProcessor(), None, train=True)
    sample = {"key": "k7", "shard": "x.tar", "images": [Image.new("RGB", (8, 8))], "seed": 0, "meta": meta}
    with pytest.raises(ConfigError) as error:
        task.collate([sample])
    assert str(error.value).startswith("x.tar: sample k7: ") and message in str(error.value)


def test_images_that_do_not_stack_are_named(tmp_path: Path, data: dict[str, Any]) -> None:
    config = tiny.make_config(tmp_path, "classification", data=data)
    task = build_task(config, ViTImageProcessorPil(do_resize=False), None, train=True)
    samples = [
        {
            "key": f"k{size}",
            "shard": "x.tar",
            "images": [Image.new("RGB", (size, size))],
            "seed": 0,
            "meta": {"label": "red"},
        }
        for size in (8, 9)
    ]
    with pytest.raises(ConfigError, match="x.tar: sample k8 and 1 more: the image processor failed") as error:
        task.collate(samples)
    assert len(str(error.value).splitlines()) == 1


def test_what_a_task_needs(tmp_path: Path, data: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no image processor"):
        build_task(tiny.make_config(tmp_path, "classification", data=data), None, None, train=True)
    with pytest.raises(ConfigError, match="no tokenizer"):
        build_task(tiny.make_config(tmp_path, "contrastive", data=data), SquareProcessor(), None, train=True)
    captions = tiny.make_config(
        tiny.save_clip(tmp_path), "contrastive", data={**data, "target": "caption", "classes": None}
    )
    built = build_model(captions, None)
    assert build_task(captions, built.processor, built.tokenizer, train=True).class_names == []
    with pytest.raises(ConfigError, match="data.classes"):
        build_task(captions, built.processor, built.tokenizer, train=False)


def test_crops_follow_their_seed() -> None:
    pattern = Image.frombytes("RGB", (40, 24), bytes(i * i % 251 for i in range(40 * 24 * 3)))
    crops = [random_resized_crop(pattern, seed).tobytes() for seed in (1, 1, 2, 3)]
    assert crops[0] == crops[1] and len(set(crops)) == 3
    assert random_resized_crop(pattern, 1).size == (24, 24)


def test_evaluation_is_never_cropped(tmp_path: Path, data: dict[str, Any]) -> None:
    config = tiny.make_config(tmp_path, "classification", data={**data, "augment": "crop"})
    assert build_task(config, SquareProcessor(), None, train=True).crop
    assert not build_task(config, SquareProcessor(), None, train=False).crop
