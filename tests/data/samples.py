"""Small samples, shards and tasks for the data room's tests."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from digrap_scale.data.loader import EvaluationLoader, TrainingLoader, build_evaluation_loader, build_training_loader
from digrap_scale.data.shards import ShardSet
from digrap_scale.data.tasks.base import Task
from digrap_scale.types import Batch


def encoded(color: tuple[int, ...] = (255, 0, 0), size: int = 8, extension: str = "png") -> bytes:
    stream = io.BytesIO()
    mode = "RGB" if len(color) == 3 else "RGBA"
    Image.new(mode, (size, size), color).save(stream, {"jpg": "jpeg"}.get(extension, extension))
    return stream.getvalue()


def make_samples(count: int, start: int = 0, classes: int = 2) -> list[dict[str, Any]]:
    return [
        {
            "key": f"s{i:06d}",
            "image": encoded((i % 256, i // 256 % 256, 0)),
            "extension": "png",
            "meta": {"label": f"class {i % classes}", "caption": f"picture {i}", "number": i},
        }
        for i in range(start, start + count)
    ]


def raw_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar with exactly these members."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample_members(key: str, meta: Any = None, image: bytes | None = None) -> list[tuple[str, bytes]]:
    meta = {"label": "class 0", "caption": "x"} if meta is None else meta
    return [(f"{key}.json", json.dumps(meta).encode()), (f"{key}.png", encoded() if image is None else image)]


def open_loader(
    shards: ShardSet, task: Task, train: bool, shuffle_buffer_samples: int, **options: Any
) -> TrainingLoader | EvaluationLoader:
    """Evaluation does not shuffle."""
    if train:
        return build_training_loader(shards, task, shuffle_buffer_samples=shuffle_buffer_samples, **options)
    return build_evaluation_loader(shards, task, **options)


class NumberTask(Task):
    """Labels are the samples' numbers, pixels their colours: shows what a loader delivers."""

    def __init__(self) -> None:
        super().__init__(None, class_names=(), label_field="label", crop=False, dtype=torch.float32)

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        numbers = torch.tensor([sample["meta"]["number"] for sample in samples])
        seeds = torch.tensor([sample["seed"] % 2**32 for sample in samples])
        return Batch({"seeds": seeds}, numbers, [sample["key"] for sample in samples])

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return model(**batch.inputs)

    def logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return model(**batch.inputs)


class SquareProcessor:
    """Images → ``pixel_values`` [B, 3, 8, 8] in 0 … 1, as an image processor would."""

    def __call__(self, images: list[Image.Image], return_tensors: str) -> dict[str, torch.Tensor]:
        assert return_tensors == "pt"
        rows = [torch.frombuffer(bytearray(i.resize((8, 8)).tobytes()), dtype=torch.uint8) for i in images]
        return {"pixel_values": torch.stack(rows).reshape(-1, 8, 8, 3).permute(0, 3, 1, 2) / 255}
