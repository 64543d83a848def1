"""A run's own checkpoints, ``checkpoints/step-N/`` (docs/checkpoints.md): the weights of their ``dcp/`` folder."""

from __future__ import annotations

from pathlib import Path

from digrap_scale.checkpoint import layout
from digrap_scale.checkpoint.formats import dcp
from digrap_scale.checkpoint.formats.base import Source
from digrap_scale.checkpoint.safe_pickle import load_metadata
from digrap_scale.errors import CheckpointError
from digrap_scale.types import WEIGHTS

_ELSEWHERE = "frozen_elsewhere"


def detect(path: Path) -> bool:
    return path.is_dir() and (path / layout.STATE).is_file() and (path / layout.DCP).is_dir()


def read(path: Path) -> Source:
    """The weights; float32 masters where the run kept them. Frozen ones may be elsewhere: see ``refuse_incomplete``.

    Raises:
        CheckpointError: incomplete, or damaged (every byte of the files that are used is compared with its checksum).
    """
    files = layout.listed_files(path)
    small = [n for n in files if n in (layout.STATE, f"{layout.DCP}/.metadata") or n.startswith(f"{layout.MODEL}/")]
    layout.refuse_damaged(path, layout.check_content(path, files, small))
    state = layout.read_state(path)
    metadata = load_metadata(path / layout.DCP)
    # Those of moments alone are not read, and so not checked.
    used = {
        f"{layout.DCP}/{place.relative_path}"
        for index, place in (metadata.storage_data or {}).items()
        if index.fqn.startswith(WEIGHTS)
    }
    if missing := sorted(used - files.keys()):
        raise CheckpointError(f"{path}: {layout.DCP}/.metadata names {missing[0]}, which is none of its files")
    layout.refuse_damaged(path, layout.check_content(path, files, sorted(used)))
    names = {key: key.removeprefix(WEIGHTS) for key in metadata.state_dict_metadata if key.startswith(WEIGHTS)}
    wanted = {name for part in ("trained", "frozen", "buffers") for name in state.get(part, [])}
    if wanted != set(names.values()):
        lacking = sorted(wanted ^ set(names.values()))[0]
        raise CheckpointError(f"{path}: {lacking} is in only one of {layout.STATE} and {layout.DCP}/.metadata")
    companions = path / layout.MODEL
    return Source(
        path,
        "digrap-scale",
        dcp.tensors_of(path / layout.DCP, metadata, names),
        aliases=dict(state.get("tied", {})),
        companions=companions if companions.is_dir() else None,
        metadata={_ELSEWHERE: state.get("frozen_elsewhere", [])},
    )


def refuse_incomplete(source: Source) -> None:
    """Raises: CheckpointError: the run kept its frozen weights out of the checkpoint."""
    if elsewhere := source.metadata.get(_ELSEWHERE):
        raise CheckpointError(
            f"{source.path}: {len(elsewhere)} frozen weights, {elsewhere[0]} first, are not in it (checkpoint.frozen_weights: "
            "false); name an adapter's base (--merge-adapter BASE), or convert the run's final/ folder"
        )
