"""Before anything is built: find every problem, make the run's folder, or find what it goes on from."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from digrap_scale.checkpoint import layout
from digrap_scale.checkpoint.atomic import write_file
from digrap_scale.checkpoint.resume import AUTO, NEVER, find_checkpoint
from digrap_scale.config import Config, dump_config
from digrap_scale.errors import ConfigError
from digrap_scale.training.batches import training_patterns
from digrap_scale.training.log import read_status
from digrap_scale.training.validate import find_problems

# What a run may change and still be the run that it was: where and how it computes, what it shows.
_FREE = (
    "run.overwrite",
    "run.deterministic",
    "checkpoint.",
    "logging.",
    "evaluation.",
    "sharding.",
    "data.workers",
    "data.prefetch_batches",
    "model.attention",
    "training.micro_batch_samples",
    "training.gradient_checkpointing",
    "training.kernels",
    "training.projection",
    "training.statistics",
    "reference.placement",
    "reference.buffer_bytes",
)
_SUPERSEDED = "superseded"


@dataclass
class Start:
    """How a run begins.

    Attributes:
        checkpoint: the folder that it goes on from, or None.
        notes: lines for the user.
    """

    checkpoint: Path | None = None
    notes: list[str] = field(default_factory=list)


def prepare_folder(folder: Path, config: Config) -> Start:
    """Rank 0's part before anything is built: find every problem, then make the run's folder, or keep it and go on.

    Raises:
        ConfigError: all problems, at once.
        CheckpointError: ``checkpoint.resume`` names no checkpoint.
    """
    problems = find_problems(config)
    resume = config.checkpoint.resume
    try:
        restarted = resume not in (AUTO, NEVER) and _is_restarted(folder, config)
        start = Start(*find_checkpoint(folder, AUTO if restarted else resume))
        if restarted and start.checkpoint is None:
            start = Start(*find_checkpoint(folder, resume))  # nothing was saved since it began there
        # The table of an earlier `evaluate` may be there already.
        earlier = folder.is_dir() and any(entry.name != "evaluation" for entry in folder.iterdir())
        goes_on = restarted or (earlier and _goes_on(folder, config, start, problems))
        if folder.exists() and not folder.is_dir():
            problems.append(f"run.folder: {folder} is a file; expected a folder or nothing there")
        elif goes_on:
            pass  # nothing to refuse, and nothing to remove
        elif earlier and not config.run.overwrite:
            problems.append(f"run.folder: {folder} holds an earlier run; set run.overwrite: true, or another folder")
        elif earlier and (read_status(folder) or {}).get("total_steps") is None:
            problems.append(f"run.folder: {folder} is not empty and holds no run of ours; choose another folder")
        elif earlier:
            problems += _inputs_inside(folder, config)
        refuse(problems)
        if earlier and not goes_on:
            shutil.rmtree(folder.resolve())
            start = Start(None if resume == AUTO else start.checkpoint)  # auto's is gone with the rest
        folder.mkdir(parents=True, exist_ok=True)
        if resume not in (AUTO, NEVER) and start.checkpoint is not None and not restarted:
            start.notes += _set_aside(folder, start.checkpoint)
    except (OSError, ValueError) as error:
        raise ConfigError(f"run.folder: {folder} cannot be made ready ({error})") from error
    if start.checkpoint is not None and resume != AUTO and not restarted:
        changed = _changed(start.checkpoint / layout.CONFIG, config)
        start.notes += [f"changed since {start.checkpoint.name}: {line}" for line in changed]
    write_file(folder / "config.yaml", dump_config(config))
    return start


def _goes_on(folder: Path, config: Config, start: Start, problems: list[str]) -> bool:
    """Whether this is the earlier run of the folder, to be continued; adds to ``problems`` what forbids it."""
    own = start.checkpoint is not None and _is_inside(start.checkpoint, layout.checkpoints_folder(folder))
    if config.checkpoint.resume != AUTO:
        return own
    if (read_status(folder) or {"state": "running"})["state"] == "done":
        return False
    if own and start.checkpoint is not None:
        changed = _changed(start.checkpoint / layout.CONFIG, config)
        if changed and config.run.overwrite:
            return False
        if changed:
            problems.append(
                f"run.folder: {folder} holds a checkpoint of another config ({'; '.join(changed[:5])}); set checkpoint.resume: "
                f"{start.checkpoint} to go on with the change, or another folder"
            )
        return True
    # Killed before its first checkpoint (or its first status): the same run starts over. Another one must not wipe it out.
    return config.checkpoint.every_steps is not None and _changed(folder / "config.yaml", config) == []


def _is_restarted(folder: Path, config: Config) -> bool:
    """Whether the folder's run began from the checkpoint that ``checkpoint.resume`` names, by this same command, and has
    not ended: launchers and schedulers repeat commands, and what was done since must not be lost."""
    if not (folder / "config.yaml").is_file() or (read_status(folder) or {"state": "running"})["state"] == "done":
        return False
    lines = _all_changed(folder / "config.yaml", config)
    return not [line for line in lines if line.startswith("checkpoint.resume:") or not line.startswith(_FREE)]


def _set_aside(folder: Path, checkpoint: Path) -> list[str]:
    """Newer checkpoints than the one that the run goes back to, in its own folder, are of another way: they would be taken
    for its own by step. They go to ``superseded/``; returns a line for each."""
    own = layout.found_steps(folder)
    here = next((step for step, path in own.items() if path.resolve() == checkpoint.resolve()), None)
    lines = []
    for step, path in own.items():
        if here is None or step <= here:
            continue
        place = path.parent / _SUPERSEDED
        number = next(n for n in count(1) if not (place / f"{path.name}.{n}").exists())
        place.mkdir(exist_ok=True)
        path.rename(place / f"{path.name}.{number}")
        lines.append(
            f"{path.name} is newer than step-{here}, which the run goes back to: moved to {place}/{path.name}.{number}"
        )
    return lines


def _changed(file: Path, config: Config) -> list[str]:
    """``section.key: old → new`` of what makes this another run than that of ``file``."""
    return [line for line in _all_changed(file, config) if not line.startswith(_FREE)]


def _all_changed(file: Path, config: Config) -> list[str]:
    try:
        old = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        return [f"{file} cannot be read ({error})"]
    return differences(old, yaml.safe_load(dump_config(config)))


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """``section.key: old → new`` of every value that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    return [] if old == new else [f"{path}: {old} → {new}"]


def _inputs_inside(folder: Path, config: Config) -> list[str]:
    """What the run reads from the folder that it is about to replace."""
    sets = [training_patterns(config), *(entry.shards for entry in config.evaluation.suite)]
    inputs = [
        config.model.path,
        config.reference.source,
        config.data.classes or "",
        *(name for one in sets for name in one),
    ]
    inside = [name for name in inputs if _is_inside(Path(name), folder)]
    return [f"run.overwrite: {folder} would be replaced, but the run reads {name} from it" for name in inside]


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def refuse(problems: list[str]) -> None:
    """Raises: ConfigError with all of ``problems``, if there are any."""
    if problems:
        raise ConfigError(problems)
