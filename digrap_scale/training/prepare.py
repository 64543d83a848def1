"""Before anything is built: find every problem, make the run's folder, or find what it goes on from."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from digrap_scale.checkpoint import layout
from digrap_scale.checkpoint.atomic import write_file
from digrap_scale.checkpoint.resume import AUTO, NEVER, find_checkpoint
from digrap_scale.config import Config, dump_config, parse_config
from digrap_scale.errors import CheckpointError, ConfigError, SaveError
from digrap_scale.training.batches import training_patterns
from digrap_scale.training.folder_lock import LOCK_FILE, FolderLock
from digrap_scale.training.status import DONE, STATUS_FILE, now, outcome_of, read_status, write_status
from digrap_scale.training.validate import check_reference, find_problems

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
# How often torchrun and SLURM have started these processes again by themselves.
_RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


@dataclass
class Start:
    """How a run begins.

    Attributes:
        checkpoint: the folder that it goes on from, or None.
        notes: lines for the user.
        replaces: the run's folder holds an earlier run, which goes.
        restarted: the run had begun from the checkpoint that ``checkpoint.resume`` names, and goes on where it was.
        done: a launcher repeats the command of a run that has come to its end.
    """

    checkpoint: Path | None = None
    notes: list[str] = field(default_factory=list)
    replaces: bool = False
    restarted: bool = False
    done: bool = False


def find_start(folder: Path, config: Config, lock: FolderLock) -> Start:
    """Rank 0's part before anything is built: find every problem, and what the run goes on from. Nothing is changed; the
    folder, if it is there, is this job's from here on.

    Raises:
        ConfigError: all problems, at once.
        CheckpointError: ``checkpoint.resume`` names no checkpoint, or the reference is damaged.
    """
    resume, restart = config.checkpoint.resume, launcher_restart()
    try:
        lock.wait()
        status = read_status(folder) or {}
        if restart is not None and status.get("state") == DONE and _changed(folder / "config.yaml", config) == []:
            return Start(done=True)
        problems = find_problems(config)
        restarted = resume not in (AUTO, NEVER) and _is_restarted(folder, config)
        start = Start(*find_checkpoint(folder, AUTO if restarted else resume), restarted=restarted)
        if restarted and start.checkpoint is None:
            start = Start(*find_checkpoint(folder, resume), restarted=True)  # nothing was saved since it began there
        earlier = holds_a_run(folder)
        if folder.exists() and not folder.is_dir():
            problems.append(f"run.folder: {folder} is a file; expected a folder or nothing there")
        elif not earlier or restarted or _goes_on(folder, config, start, problems):
            pass  # nothing to refuse, and nothing to remove
        elif not config.run.overwrite:
            problems.append(f"run.folder: {folder} holds an earlier run; set run.overwrite: true, or another folder")
        elif "total_steps" not in status:
            problems.append(f"run.folder: {folder} is not empty and holds no run of ours; choose another folder")
        elif restart is not None and (status["state"] == DONE or _has_checkpoints(folder)):
            problems.append(
                f"run.overwrite: {folder} holds a finished run or checkpoints, and a command that the launcher repeats "
                f"({restart}) removes neither; start it anew yourself, or choose another folder"
            )
        else:
            problems += _inputs_inside(folder, config)
            start.replaces = True
        if start.checkpoint is not None and not (start.replaces and resume == AUTO):
            problems += _length_problems(start.checkpoint, config)
        refuse(problems)
        check_reference(config)
    except (OSError, ValueError) as error:
        raise _not_ready(folder, error) from error
    if start.replaces and resume == AUTO:
        start.checkpoint = None  # it goes with the rest
    return start


def make_folder(folder: Path, config: Config, start: Start, lock: FolderLock) -> None:
    """Rank 0's next part, when the checkpoint is found whole: make the run's folder, or keep it; adds to ``start.notes``.

    Raises:
        ConfigError: it cannot be made, or another job has made it meanwhile.
    """
    begins_there = start.checkpoint is not None and config.checkpoint.resume != AUTO and not start.restarted
    try:
        lock.take()
        if start.replaces:
            _empty(folder)
        if start.checkpoint is not None and begins_there:
            start.notes += _set_aside(folder, start.checkpoint)
            changed = _changed(start.checkpoint / layout.CONFIG, config)
            start.notes += [f"changed since {start.checkpoint.name}: {line}" for line in changed]
    except OSError as error:
        raise _not_ready(folder, error) from error
    write_file(folder / "config.yaml", dump_config(config))


def holds_a_run(folder: Path) -> bool:
    """Whether there is more than the table of an earlier ``evaluate``, or how a start ended that came to nothing."""
    others = ("evaluation", STATUS_FILE, LOCK_FILE)
    return folder.is_dir() and any(entry.name not in others for entry in folder.iterdir())


def _empty(folder: Path) -> None:
    """All but the lock goes."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK_FILE:
            entry.unlink()


def _may_tell(folder: Path, config: Config, lock: FolderLock) -> bool:
    """Whether how a start ended may be told there: not in place of a finished run's end, nor of another job's run, nor among
    files that are not ours."""
    if folder.exists() and not folder.is_dir():
        return False
    try:
        if lock.is_elsewhere():
            return False
        status = read_status(folder)
    except (OSError, ValueError):
        return False
    if status is not None:
        return status.get("state") != DONE
    return not holds_a_run(folder) or _changed(folder / "config.yaml", config) == []


@contextmanager
def telling_early_end(config: Config, rank: int, lock: FolderLock) -> Iterator[None]:
    """What ends a run before its log is there is in its ``status.json``, too; a finished run's stays as it is, and so does
    that of a run that another job goes on with."""
    started = now()
    try:
        yield
    except BaseException as error:
        folder = Path(config.run.folder)
        makes_none = (
            isinstance(error, ConfigError) and not folder.exists()
        )  # of a run that cannot start there is nothing
        if rank == 0 and not makes_none and _may_tell(folder, config, lock):
            before = read_status(folder) or {}
            try:
                write_status(
                    folder,
                    *outcome_of(error),
                    step=before.get("step", 0),
                    total_steps=before.get("total_steps"),
                    started=started,
                )
            except SaveError as failed:
                print(f"also, {failed}", file=sys.stderr)  # the first error is what the user must read
        raise


def launcher_restart() -> str | None:
    """``NAME=count`` where torchrun or SLURM repeats a command by itself; None where somebody started it."""
    for name in _RESTART_COUNTS:
        if os.environ.get(name, "0") not in ("", "0"):
            return f"{name}={os.environ[name]}"
    return None


def _not_ready(folder: Path, error: Exception) -> ConfigError:
    return ConfigError(f"run.folder: {folder} cannot be made ready ({error})")


def _has_checkpoints(folder: Path) -> bool:
    return any(layout.is_committed(path) for path in layout.found_steps(folder).values())


def _goes_on(folder: Path, config: Config, start: Start, problems: list[str]) -> bool:
    """Whether this is the earlier run of the folder, to be continued; adds to ``problems`` what forbids it."""
    own = start.checkpoint is not None and _is_inside(start.checkpoint, layout.checkpoints_folder(folder))
    if config.checkpoint.resume != AUTO:
        return own
    if (read_status(folder) or {"state": "running"})["state"] == DONE:
        return False
    if own and start.checkpoint is not None:
        if _damaged(start.checkpoint):
            return (
                True  # not to be compared, and never a reason to remove the others: whoever opens it says what is wrong
            )
        file = start.checkpoint / layout.CONFIG
        changed = _changed(file, config)
        if changed and config.run.overwrite and not changed[0].startswith(str(file)):
            return False
        if changed:
            problems.append(
                f"run.folder: {folder} holds a checkpoint of another config ({'; '.join(changed[:5])}); set checkpoint.resume: "
                f"{start.checkpoint} to go on with the change, or another folder"
            )
        return True
    # Killed before its first checkpoint (or its first status): the same run starts over. Another one must not wipe it out.
    return config.checkpoint.every_steps is not None and _changed(folder / "config.yaml", config) == []


def _length_problems(checkpoint: Path, config: Config) -> list[str]:
    """What would give the run another length than the config says: steps are counted from the first one on, in batches of one
    size."""
    training = config.training
    if _damaged(checkpoint):
        return []  # whoever opens it says what is wrong
    if training.steps is not None:
        step = int(layout.read_state(checkpoint)["step"])
        few = f"training.steps: expected {step} or more, those of {checkpoint.name}, found {training.steps}"
        return [few] if training.steps < step else []
    try:
        before = parse_config((checkpoint / layout.CONFIG).read_text(encoding="utf-8"), layout.CONFIG).training
    except ConfigError:
        return []  # of another version: told as a change
    if before.global_batch_samples == training.global_batch_samples:
        return []
    key = "epochs" if training.epochs is not None else "samples"
    return [
        f"training.global_batch_samples: expected {before.global_batch_samples}, that of {checkpoint.name}, with training.{key}, "
        f"found {training.global_batch_samples}; set training.steps in its place, the steps that were done included"
    ]


def refuse_shorter(config: Config, step: int, total_steps: int) -> None:
    """Raises: ConfigError: a checkpoint of ``step`` is beyond the run's end; it would be done without a step."""
    if step > total_steps:
        key = next(key for key in ("steps", "epochs", "samples") if getattr(config.training, key) is not None)
        raise ConfigError(
            f"training.{key}: expected {step} steps or more, those of the checkpoint, found {total_steps}"
        )


def _damaged(checkpoint: Path) -> bool:
    """Whether its config is not the one that was saved, or files are missing; no tensor is read."""
    try:
        files = layout.listed_files(checkpoint)
        return layout.CONFIG not in files or bool(layout.check_content(checkpoint, files, [layout.CONFIG]))
    except (CheckpointError, OSError):
        return True


def _is_restarted(folder: Path, config: Config) -> bool:
    """Whether the folder's run began from the checkpoint that ``checkpoint.resume`` names, by this same command, and has
    not ended: launchers and schedulers repeat commands, and what was done since must not be lost."""
    if not (folder / "config.yaml").is_file() or (read_status(folder) or {"state": "running"})["state"] == DONE:
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
    """A single line that begins with ``file`` where it cannot be read."""
    try:
        old = parse_config(file.read_text(encoding="utf-8"), file.name)  # keys that came since have their defaults
    except (OSError, ValueError, ConfigError) as error:
        return [f"{file} cannot be read ({str(error).splitlines()[0]})"]
    return differences(yaml.safe_load(dump_config(old)), yaml.safe_load(dump_config(config)))


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
