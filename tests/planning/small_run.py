"""A run that is small, but whose states are large against what else a process holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from digrap_scale.data.shards import write_shards
from tests.data.samples import make_samples

CLASSES = 3
SIDE = 32
# DeepSpeed's buckets would be larger than all else.
SMALL_BUCKETS = {"reduce_bucket_elements": 100_000}


def save_model(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """0.8 M parameters in four blocks, 4 bytes each."""
    torch.manual_seed(0)
    settings = ViTConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=2, image_size=SIDE, patch_size=8,
        num_labels=CLASSES,
    )  # fmt: skip
    ViTForImageClassification(settings).to(dtype).save_pretrained(folder / "model")
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder / "model")
    (folder / "classes.json").write_text(json.dumps([f"class {i}" for i in range(CLASSES)]))
    return folder


def save_shards(folder: Path, samples: int = 48, shards: int = 4) -> None:
    write_shards(make_samples(samples, classes=CLASSES), folder, prefix="train", samples_per_shard=samples // shards)


def run_of(folder: Path, **sections: dict[str, Any]) -> str:
    """The run's YAML; ``sections`` are put over its own."""
    values: dict[str, Any] = {
        "run": {"folder": f"{folder}/run"},
        "model": {"path": f"{folder}/model", "task": "classification"},
        "data": {"train": [f"{folder}/train-*.tar"], "classes": f"{folder}/classes.json"},
        "method": {"name": "digrap"},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 4, "global_batch_samples": 12},
        "logging": {"every_steps": 1, "tensorboard": False},
        "checkpoint": {"every_steps": None, "final": False},
    }
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys} if "name" not in keys else keys
    return yaml.safe_dump(values)
