"""Runs from their config within ranks that are there already: straight, and again from a checkpoint."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file

from digrap_scale.checkpoint.dcp import StoredParts
from digrap_scale.config import parse_config
from digrap_scale.training import loop, run
from digrap_scale.training.faults import StopRequest
from digrap_scale.training.folder_lock import FolderLock
from digrap_scale.training.setup import Place
from digrap_scale.types import Batch, TensorPart
from tests.distributed.training_runs import allow_float16

ASSETS = Path(__file__).parents[2] / "digrap_scale" / "demo" / "assets" / "pictograms"


def values_of(path: Path, folder: Path, backend: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """A short run's config."""
    values: dict[str, Any] = {
        "run": {"folder": str(folder)},
        "model": {"path": str(path), "task": "classification"},
        "data": {
            "train": [str(ASSETS / "noto-train-*.tar")],
            "classes": str(ASSETS / "classes.json"),
            "shuffle_buffer_samples": 20,
            "augment": "crop",
        },
        "method": {"name": "digrap", "strength_lr": 0.05},
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.01},
        "schedule": {"warmup_steps": 2},
        "sharding": {"backend": backend},
        "training": {"steps": 6, "global_batch_samples": 12, "max_grad_norm": 1.0},
        "checkpoint": {"every_steps": 3, "keep_last": 5, "final": False},
        "logging": {"every_steps": 1, "tensorboard": False},
    }
    for section, changes in sections.items():
        kept = values.get(section, {})
        if not changes.get("name", "digrap").startswith("digrap") and section == "method":
            kept = {}  # another method has other keys
        values[section] = {**kept, **changes}
    return values


def train_here(values: dict[str, Any]) -> None:
    """The run, in this process's place."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    here = Place(rank, size, torch.device("cpu"))
    with ExitStack() as watches, FolderLock(Path(values["run"]["folder"])) as lock:
        run._train(parse_config(yaml.safe_dump(values)), here, StopRequest(), watches, lock)


def run_here(values: dict[str, Any]) -> list[list[str]]:
    """The run, in this process's place; returns the keys of its batches."""
    keys: list[list[str]] = []
    original = loop.prepared

    def noted(engine: Any, batch: Batch) -> Batch:
        keys.append(batch.keys)
        return original(engine, batch)

    loop.prepared = noted
    if values["sharding"].get("mixed_precision") == "float16":
        overflow_at_first()
    try:
        train_here(values)
    finally:
        loop.prepared = original
    return keys


def overflow_at_first() -> None:
    """A loss scale with which the first steps of a float16 run overflow, on CPUs too."""
    from digrap_scale.sharding.zero_engine import ZeroEngine

    allow_float16()
    original = ZeroEngine.deepspeed_config

    def high(engine: ZeroEngine) -> dict[str, Any]:
        found = original(engine)
        if "fp16" in found:  # runs of other dtypes follow in the same process
            found["fp16"] |= {"initial_scale_power": 18, "hysteresis": 1}
        return found

    if original.__name__ != "high":
        ZeroEngine.deepspeed_config = high  # type: ignore[method-assign]


def run_all(runs: dict[str, dict[str, Any]]) -> dict[str, list[list[str]]]:
    """Several runs, one after the other, in the same processes."""
    return {name: run_here(values) for name, values in runs.items()}


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's ``dcp``, whole (float32 and float64 as they are), and of its method's state (``ω.…``)."""
    stored = StoredParts(checkpoint / "dcp")
    shapes = stored.shapes
    flat = {key: torch.zeros(torch.Size(shape).numel(), dtype=torch.float64) for key, shape in shapes.items()}
    stored.read([TensorPart(k, shapes[k], 0, f.numel(), f) for k, f in flat.items()])
    method = {f"ω.{key}": value for key, value in load_file(checkpoint / "method.safetensors").items()}
    return {**{key: value.view(shapes[key]) for key, value in flat.items()}, **method}
