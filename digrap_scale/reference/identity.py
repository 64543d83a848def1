"""Which checkpoint a reference is: a hash of its index, and of the beginning of every tensor."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from digrap_scale.errors import CheckpointError
from digrap_scale.reference.store import SafetensorsReader

_SAMPLED_BYTES = 4096


def reference_identity(path: str | Path) -> str:
    """SHA-256 (hex) over every tensor's name, dtype and shape, and its first 4096 bytes; how files are cut does not matter.

    The whole of a reference of many GB is not read: this tells two fine-tunes of one architecture apart, not two bits.

    Raises:
        CheckpointError: no safetensors there, or damaged ones.
    """
    reader = SafetensorsReader(path)
    digest = hashlib.sha256()
    for name in reader.names():
        digest.update(json.dumps([name, reader.dtypes[name], list(reader.shapes[name])]).encode())
        file, offset, size = reader.extent(name)
        try:
            with file.open("rb") as opened:
                opened.seek(offset)
                digest.update(opened.read(min(size, _SAMPLED_BYTES)))
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error})") from error
    return digest.hexdigest()
