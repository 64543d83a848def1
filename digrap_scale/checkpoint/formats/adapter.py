"""PEFT adapters: ``adapter_model.safetensors`` beside ``adapter_config.json``."""

from __future__ import annotations

from pathlib import Path

from digrap_scale.checkpoint.formats.base import Source
from digrap_scale.checkpoint.formats.huggingface import tensors_of

STEM = "adapter_model"
CONFIG = "adapter_config.json"


def detect(path: Path) -> bool:
    return path.is_dir() and (path / CONFIG).is_file() and (path / f"{STEM}.safetensors").is_file()


def read(path: Path) -> Source:
    """Raises: CheckpointError."""
    return Source(path, "adapter", tensors_of(path, STEM), companions=path, metadata={"stem": STEM})
