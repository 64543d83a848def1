"""Formats of weights on disk: a file each, and one line here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from digrap_scale.checkpoint.formats import adapter, dcp, huggingface, ours, universal, zero, zero_writer
from digrap_scale.checkpoint.formats.base import Source, WriteOptions
from digrap_scale.errors import CheckpointError

# Name → (is this path one of them, open it). The first that says yes is taken: more special ones come first.
READERS: dict[str, tuple[Callable[[Path], bool], Callable[[Path], Source]]] = {
    "digrap-scale": (ours.detect, ours.read),
    "universal": (universal.detect, universal.read),
    "zero": (zero.detect, zero.read),
    "dcp": (dcp.detect, dcp.read),
    "adapter": (adapter.detect, adapter.read),
    "safetensors": (huggingface.detect, huggingface.read),
}
# Name → write into an empty folder.
WRITERS: dict[str, Callable[[Source, Path, WriteOptions], None]] = {
    "safetensors": huggingface.write,
    "dcp": dcp.write,
    "zero": zero_writer.write,
}


def open_source(path: str | Path) -> Source:
    """Opens a checkpoint of any known format; nothing of it is in memory.

    Raises:
        CheckpointError: nothing there, no known format, or a damaged checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a checkpoint's folder or a .safetensors file")
    for detect, read in READERS.values():
        if detect(path):
            return read(path)
    raise CheckpointError(
        f"{path}: no checkpoint of a known format ({', '.join(READERS)}); give the folder that holds its files"
    )
