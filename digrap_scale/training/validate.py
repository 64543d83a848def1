"""Every problem of a run that shows without training it: config, data, model, all at once."""

from __future__ import annotations

import os
from pathlib import Path

from digrap_scale.config import Config
from digrap_scale.config.schema import REFERENCE_WORDS
from digrap_scale.data.check import check_data
from digrap_scale.data.classes import load_classes
from digrap_scale.errors import CheckpointError, ConfigError
from digrap_scale.models.check import check_model, describe_model
from digrap_scale.planning.disk import disk_lines, disk_need
from digrap_scale.planning.plan import check_ranks
from digrap_scale.planning.weights import read_model
from digrap_scale.reference.store import SafetensorsReader
from digrap_scale.sharding.deepspeed_json import json_problems
from digrap_scale.training.batches import count_steps, describe_data, open_training_data
from digrap_scale.training.class_answers import class_answer_problems
from digrap_scale.training.trackers import missing_trackers


def validate(config: Config, world_size: int | None = None) -> list[str]:
    """Lines that tell what the config's regexes match, what each loader process reads, and what the run will write.

    Args:
        config: the run.
        world_size: processes of the job; None: the launcher's, or 1.

    Raises:
        ConfigError: all problems that were found.
        CheckpointError: the reference is damaged.
    """
    problems = find_problems(config)
    if problems:
        raise ConfigError(problems)
    check_reference(config)
    if world_size is None:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_ranks(config, world_size)
    num_classes = _num_classes(config)
    sources = open_training_data(config).sources
    lines = describe_model(config, num_classes) + describe_data(config, world_size, sources)
    samples = sum(source.shards.samples for source in sources)
    need = disk_need(read_model(config, num_classes), config, count_steps(config, samples))
    line, problem = disk_lines(need, config)
    if problem is not None:
        raise ConfigError(problem)
    return [*lines, line]


def find_problems(config: Config) -> list[str]:
    """Every problem that shows without loading weights, a line each; empty if nothing was found."""
    problems = check_data(config)
    num_classes = None
    try:
        num_classes = _num_classes(config)
    except ConfigError as error:
        problems += [problem for problem in error.problems if problem not in problems]
    if config.evaluation.suite and config.data.classes is None and config.model.task != "vqa":
        problems.append("data.classes: expected a file, found none; evaluation.suite tells classes apart")
    return (
        problems
        + check_model(config, num_classes)
        + class_answer_problems(config)
        + _missing_reference(config)
        + json_problems(config)
        + missing_trackers(config)
    )


def _missing_reference(config: Config) -> list[str]:
    source = config.reference.source
    if source in REFERENCE_WORDS or Path(source).exists():
        return []
    return [f"reference.source: {source}: does not exist; expected a folder, a .safetensors file or its index"]


def check_reference(config: Config) -> None:
    """Whether a reference that is a path can be opened; its fit is checked when the model is there.

    Raises:
        CheckpointError: it holds no safetensors, or damaged ones.
    """
    if config.reference.source in REFERENCE_WORDS:
        return
    try:
        SafetensorsReader(config.reference.source)
    except CheckpointError as error:
        raise CheckpointError(f"reference.source: {error}") from error


def _num_classes(config: Config) -> int | None:
    return None if config.data.classes is None else len(load_classes(config.data.classes).names)
