"""Data problems that can be told before any process starts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from digrap_scale.config.schema import Config
from digrap_scale.data.classes import Classes, load_classes
from digrap_scale.data.reading import samples_of
from digrap_scale.data.shards import ShardSet
from digrap_scale.data.splitting import Span
from digrap_scale.data.tasks.base import text_field
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
    elif config.evaluation.suite:
        problems.append("data.classes: needed by evaluation.suite: a JSON list of names or object of name → prompt")
    label = (data.label_field, "data.label_field")
    caption = (data.caption_field, "data.caption_field")
    field = caption if data.target == "caption" else label
    if data.train:
        problems += _check_set("data.train", data.train, classes, field, data.on_bad_sample == "skip")
    for index, source in enumerate(data.sources):
        where = f"data.sources.{index} ({source.name})"
        problems += _check_set(where, source.shards, classes, field, data.on_bad_sample == "skip")
    for index, entry in enumerate(config.evaluation.suite):
        problems += _check_set(f"evaluation.suite.{index} ({entry.name})", entry.shards, classes, label)
    return problems


def _check_set(
    where: str, patterns: Sequence[str], classes: Classes | None, field: tuple[str, str], skip: bool = False
) -> list[str]:
    """Opens a set and decodes its first samples."""
    try:
        shards = ShardSet.open(patterns, skip=skip)
        spans = [Span(i, 0, count) for i, count in enumerate(shards.counts) if count]
        is_label = field[1] == "data.label_field"
        for sample in itertools.islice(samples_of(spans, shards.paths, shards.offsets, skip), LOOKED_AT_SAMPLES):
            text = text_field(sample, *field)
            if is_label and classes is not None and text not in classes.names:
                return [f"{where}: {sample['shard']}: sample {sample['key']}: label {text!r} is not among data.classes"]
    except ConfigError as error:
        return [f"{where}: {problem}" for problem in error.problems]
    return []
