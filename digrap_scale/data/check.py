"""Data problems that can be told before any process starts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from digrap_scale.config.schema import Config, DataConfig
from digrap_scale.data.classes import Classes, load_classes
from digrap_scale.data.fetch import open_shards
from digrap_scale.data.reading import samples_of
from digrap_scale.data.splitting import Span
from digrap_scale.data.tasks.base import only_image, text_field, texts_field, unknown_label
from digrap_scale.errors import ConfigError

LOOKED_AT_SAMPLES = 16


def check_data(config: Config) -> list[str]:
    """Every problem of shards and classes, a line each; the first samples of every set are decoded.

    Empty if nothing was found. Reads no whole shard unless a manifest is missing, and no weights.
    """
    data = config.data
    problems: list[str] = []
    classes: Classes | None = None
    if data.classes is not None:
        try:
            classes = load_classes(data.classes)
        except ConfigError as error:
            problems += error.problems
    elif config.evaluation.suite and config.model.task != "vqa":
        problems.append("data.classes: needed by evaluation.suite: a JSON list of names or object of name → prompt")
    captions, skip = data.target == "caption", data.on_bad_sample == "skip"
    sets = [("data.train", data.train, captions, skip)] if data.train else []
    sets += [(f"data.sources.{i} ({one.name})", one.shards, captions, skip) for i, one in enumerate(data.sources)]
    suite = enumerate(config.evaluation.suite)
    sets += [(f"evaluation.suite.{i} ({one.name})", one.shards, False, False) for i, one in suite]
    for where, patterns, of_captions, may_skip in sets:
        problems += _check_set(where, patterns, data, partial(_check_sample, config, classes, of_captions), may_skip)
    return problems


def _check_sample(config: Config, classes: Classes | None, captions: bool, sample: dict[str, Any]) -> None:
    """Raises: ConfigError where the sample lacks what the task needs."""
    data = config.data
    if config.model.task == "vqa":
        text_field(sample, data.question_field, "data.question_field")
        texts_field(sample, data.answers_field, "data.answers_field")
        return
    only_image(sample)
    if captions:
        text_field(sample, data.caption_field, "data.caption_field")
        return
    label = text_field(sample, data.label_field, "data.label_field")
    if classes is not None and label not in classes.names:
        raise unknown_label(sample, label, classes.names)


def _check_set(
    where: str, patterns: Sequence[str], data: DataConfig, check: Callable[[dict[str, Any]], None], skip: bool
) -> list[str]:
    """Opens a set, decodes its first samples and checks each."""
    try:
        shards = open_shards(patterns, data, skip=skip)
        spans = [Span(i, 0, count) for i, count in enumerate(shards.counts) if count]
        for sample in itertools.islice(samples_of(spans, shards.paths, shards.offsets, skip), LOOKED_AT_SAMPLES):
            try:
                check(sample)
            except ConfigError:
                if not skip:  # as in training, which leaves it out and counts it
                    raise
    except ConfigError as error:
        return [f"{where}: {problem}" for problem in error.problems]
    return []
