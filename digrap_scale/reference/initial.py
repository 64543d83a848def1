"""Initial weights: a checkpoint opened for one model, to be read slice by slice."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from digrap_scale.file_names import loaded_names
from digrap_scale.reference.store import SafetensorsReader
from digrap_scale.types import StoredWeights


def open_weights(folder: Path, model: nn.Module) -> StoredWeights:
    """The folder's checkpoint, as ``from_pretrained`` would load it into ``model`` (whose weights are not touched).

    Raises:
        CheckpointError: no safetensors, or damaged ones.
    """
    reader = SafetensorsReader(folder)
    file_names, converted = loaded_names(model, reader.names())
    return StoredWeights(reader.shapes, file_names, converted, reader.read)
