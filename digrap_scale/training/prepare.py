"""Before anything is built: find every problem, make the run's folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from digrap_scale.checkpoint.atomic import write_file
from digrap_scale.config import Config, dump_config
from digrap_scale.errors import ConfigError
from digrap_scale.training.batches import training_patterns
from digrap_scale.training.log import read_status
from digrap_scale.training.validate import find_problems


def prepare_folder(folder: Path, config: Config) -> None:
    """Rank 0's part before anything is built: find every problem, then make the run's folder.

    Raises:
        ConfigError: all problems, at once.
    """
    problems = find_problems(config)
    try:
        # The table of an earlier `evaluate` may be there already.
        earlier = folder.is_dir() and any(entry.name != "evaluation" for entry in folder.iterdir())
        if folder.exists() and not folder.is_dir():
            problems.append(f"run.folder: {folder} is a file; expected a folder or nothing there")
        elif earlier and not config.run.overwrite:
            problems.append(f"run.folder: {folder} holds an earlier run; set run.overwrite: true, or another folder")
        elif earlier and (read_status(folder) or {}).get("total_steps") is None:
            problems.append(f"run.folder: {folder} is not empty and holds no run of ours; choose another folder")
        elif earlier:
            problems += _inputs_inside(folder, config)
        refuse(problems)
        if earlier:
            shutil.rmtree(folder.resolve())
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"run.folder: {folder} cannot be made ready ({error})") from error
    write_file(folder / "config.yaml", dump_config(config))


def _inputs_inside(folder: Path, config: Config) -> list[str]:
    """What the run reads from the folder that it is about to replace."""
    sets = [training_patterns(config), *(entry.shards for entry in config.evaluation.suite)]
    inputs = [
        config.model.path,
        config.reference.source,
        config.data.classes or "",
        *(name for one in sets for name in one),
    ]
    inside = [name for name in inputs if Path(name).resolve().is_relative_to(folder.resolve())]
    return [f"run.overwrite: {folder} would be replaced, but the run reads {name} from it" for name in inside]


def refuse(problems: list[str]) -> None:
    """Raises: ConfigError with all of ``problems``, if there are any."""
    if problems:
        raise ConfigError(problems)
