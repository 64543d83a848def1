"""A run's own checkpoints, ``checkpoints/step-N/`` (docs/checkpoints.md): the weights of their ``dcp/`` folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from digrap_scale.checkpoint.formats import dcp
from digrap_scale.checkpoint.formats.base import Source
from digrap_scale.checkpoint.safe_pickle import load_metadata
from digrap_scale.errors import CheckpointError

_STATE, _SUMS, _COMMITTED, _PREFIX = "state.json", "checksums.json", "COMMITTED", "model."


def detect(path: Path) -> bool:
    return path.is_dir() and (path / _STATE).is_file() and (path / "dcp").is_dir()


def read(path: Path) -> Source:
    """The weights; float32 masters where the run kept them. Raises: CheckpointError."""
    state = _committed(path)
    folder = path / "dcp"
    metadata = load_metadata(folder)
    names = {key: key.removeprefix(_PREFIX) for key in metadata.state_dict_metadata if key.startswith(_PREFIX)}
    wanted = {name for part in ("trained", "frozen", "buffers") for name in state.get(part, [])}
    if wanted != set(names.values()):
        lacking = sorted(wanted ^ set(names.values()))[0]
        raise CheckpointError(
            f"{folder}: {lacking} is in only one of {_STATE} and .metadata; its files are not of one save"
        )
    companions = path / "model"
    return Source(
        path,
        "digrap-scale",
        dcp.tensors_of(folder, metadata, names),
        aliases=dict(state.get("tied", {})),
        companions=companions if companions.is_dir() else None,
    )


def _committed(path: Path) -> dict[str, Any]:
    """``state.json`` of a save that ended; sizes are compared with the list that the commit mark vouches for."""
    if not (path / _COMMITTED).is_file():
        raise CheckpointError(f"{path} is incomplete (no {_COMMITTED}: its save did not end); take an older step")
    try:
        mark = json.loads((path / _COMMITTED).read_text())
        sums = (path / _SUMS).read_bytes()
        if hashlib.sha256(sums).hexdigest() != mark["checksums_sha256"]:
            raise CheckpointError(f"{path / _SUMS}: is not what {_COMMITTED} vouches for; take an older step")
        for name, entry in json.loads(sums)["files"].items():
            found = (path / name).stat().st_size if (path / name).is_file() else None
            if found != entry["bytes"]:
                raise CheckpointError(
                    f"{path / name}: expected {entry['bytes']} bytes, found {found}; take an older step"
                )
        state: dict[str, Any] = json.loads((path / _STATE).read_text())
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint ({type(error).__name__}: {error})") from error
    return state
