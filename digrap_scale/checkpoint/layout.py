"""The layout of a run's checkpoints (docs/checkpoints.md): names, what is complete, and whether it is what was written."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from digrap_scale.errors import CheckpointError

FORMAT = 1
STATE, CONFIG, METHOD, MODEL, DCP, RNG = "state.json", "config.yaml", "method.safetensors", "model", "dcp", "rng"
DEEPSPEED = "deepspeed"
CHECKSUMS, COMMITTED = "checksums.json", "COMMITTED"
_STEP = re.compile(r"step-(\d+)")
_READ_BYTES = 1 << 22
_HASHING_THREADS = 4


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    Attributes:
        folder: ``…/checkpoints/step-N``.
        state: its ``state.json``.
    """

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])


def checkpoints_folder(run_folder: Path) -> Path:
    """Where a run's checkpoints are."""
    return run_folder / "checkpoints"


def step_folder(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is."""
    return checkpoints_folder(run_folder) / f"step-{step}"


def rng_file(folder: Path, rank: int) -> Path:
    """A rank's random generators: the last file that it writes."""
    return folder / RNG / f"rank-{rank}.safetensors"


def found_steps(run_folder: Path) -> dict[int, Path]:
    """Step → folder, newest first, committed or not. A symbolic link (``latest``) is no folder of ours."""
    parent = checkpoints_folder(run_folder)
    if not parent.is_dir():
        return {}
    named = {path: _STEP.fullmatch(path.name) for path in parent.iterdir() if path.is_dir() and not path.is_symlink()}
    steps = {int(match.group(1)): path for path, match in named.items() if match is not None}
    return dict(sorted(steps.items(), reverse=True))


def is_committed(folder: Path) -> bool:
    """Whether the save came to its end."""
    return (folder / COMMITTED).is_file()


def missing_ranks(folder: Path) -> list[int]:
    """Of a save that did not end: ranks whose last file is not there (all known ones, if even the first file is missing)."""
    try:
        size = int(json.loads((folder / STATE).read_text(encoding="utf-8"))["world_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return [0]
    return [rank for rank in range(size) if not rng_file(folder, rank).is_file()]


def files_of(folder: Path) -> list[str]:
    """Every file of a checkpoint but the two that speak of the others, by path relative to it, sorted."""
    relative = (
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()
    )
    return sorted(name for name in relative if name not in (CHECKSUMS, COMMITTED))


def checksum(file: Path) -> dict[str, Any]:
    """A file's entry in ``checksums.json``."""
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as opened:
        while piece := opened.read(_READ_BYTES):
            digest.update(piece)
            size += len(piece)
    return {"bytes": size, "sha256": digest.hexdigest()}


def encode(value: Any) -> str:
    """JSON, for people too."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def committed_mark(step: int, checksums: str) -> str:
    """The content of ``COMMITTED``."""
    return encode({"format": FORMAT, "step": step, "checksums_sha256": hashlib.sha256(checksums.encode()).hexdigest()})


def listed_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The checkpoint's files as ``checksums.json`` lists them, nothing of their content read.

    Raises:
        CheckpointError: not committed; a list that is not the committed one; files that are missing, too many or of
            another size, by name.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a checkpoint's folder (…/checkpoints/step-N), found none")
    if not is_committed(folder):
        raise CheckpointError(f"{folder}: incomplete: it has no {COMMITTED}, its save did not end")
    try:
        mark = json.loads((folder / COMMITTED).read_text(encoding="utf-8"))
        text = (folder / CHECKSUMS).read_bytes()
        if mark["format"] != FORMAT:
            raise CheckpointError(
                f"{folder}: format {mark['format']!r}, expected {FORMAT}; use the version that wrote it"
            )
        if hashlib.sha256(text).hexdigest() != mark["checksums_sha256"]:
            raise CheckpointError(f"{folder}: {CHECKSUMS} is not the one that was committed")
        files: dict[str, dict[str, Any]] = json.loads(text)["files"]
        sizes = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: {COMMITTED} or {CHECKSUMS} cannot be read ({error})") from error
    problems = [f"{name}: missing" for name in sizes if not (folder / name).is_file()]
    problems += [f"{name}: not of this checkpoint" for name in files_of(folder) if name not in sizes]
    problems += [
        f"{name}: expected {size} bytes, found {found}"
        for name, (size, _) in sizes.items()
        if (folder / name).is_file() and (found := (folder / name).stat().st_size) != size
    ]
    refuse_damaged(folder, problems)
    return files


def check_content(folder: Path, files: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> list[str]:
    """Those of ``names`` whose content is not what was written."""
    names = list(names)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:  # hashlib lets go of the interpreter
        found = pool.map(lambda name: checksum(folder / name)["sha256"], names)
        return [
            f"{name}: its SHA-256 differs"
            for name, sha256 in zip(names, found, strict=True)
            if sha256 != files[name]["sha256"]
        ]


def refuse_damaged(folder: Path, problems: list[str]) -> None:
    """Raises: CheckpointError that names the files, if there are ``problems``."""
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{folder}: damaged: {'; '.join(problems[:5])}{more}")


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's ``state.json``. Raises: CheckpointError."""
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
        step = int(state["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE}: cannot be read ({error})") from error
    if (match := _STEP.fullmatch(folder.name)) is not None and int(match.group(1)) != step:
        raise CheckpointError(f"{folder}: its {STATE} is of step {step}; expected the folder's own")
    return state


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """A checkpoint, with every byte of it checked.

    Raises:
        CheckpointError: it is incomplete or damaged; the message names the files.
    """
    folder = Path(folder)
    files = listed_files(folder)
    refuse_damaged(folder, check_content(folder, files, files))
    return Checkpoint(folder, read_state(folder))
