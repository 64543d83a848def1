"""A run's training data, as its config has them: sources, batches of this rank, steps."""

from __future__ import annotations

import math

from digrap_scale.config import Config
from digrap_scale.data.loader import TrainingLoader, build_training_loader
from digrap_scale.data.shards import ShardSet
from digrap_scale.data.sources import Source
from digrap_scale.data.tasks.base import Task
from digrap_scale.sharding.engine import Engine
from digrap_scale.training.setup import Place


def open_training_data(config: Config) -> list[Source]:
    """``data.train`` as one source, or ``data.sources``.

    Raises:
        ConfigError: see ``ShardSet.open``.
    """
    data = config.data
    skip = data.on_bad_sample == "skip"
    if data.train:
        return [Source("train", ShardSet.open(data.train, skip=skip))]
    return [Source(s.name, ShardSet.open(s.shards, skip=skip), s.weight) for s in data.sources]


def training_patterns(config: Config) -> list[str]:
    """The shard patterns of the training data."""
    return [*config.data.train, *(pattern for source in config.data.sources for pattern in source.shards)]


def training_loader(data: list[Source], task: Task, config: Config, here: Place, engine: Engine) -> TrainingLoader:
    """This rank's batches, without an end."""
    options = config.data
    return build_training_loader(
        data,
        task,
        batch_samples=engine.micro_batch_samples,
        accumulation_steps=engine.accumulation_steps,
        rank=here.rank,
        world_size=here.world_size,
        workers=options.workers,
        prefetch_batches=options.prefetch_batches,
        seed=config.run.seed,
        shuffle_buffer_samples=options.shuffle_buffer_samples,
        order=options.order,
        remainder=options.remainder,
        on_bad_sample=options.on_bad_sample,
        max_bad_samples=options.max_bad_samples,
    )


def count_steps(config: Config, samples: int) -> int:
    """Optimizer steps of the run: ``training.steps``, those of ``training.epochs`` passes, or of ``training.samples``.

    Args:
        samples: of the training data; a pass over a mixture is as many.
    """
    training = config.training
    if training.steps is not None:
        return training.steps
    if training.samples is not None:
        return max(1, training.samples // training.global_batch_samples)
    assert training.epochs is not None  # the schema asks for one of the three
    whole = config.data.remainder != "drop" and not config.data.sources
    per_epoch = samples / training.global_batch_samples
    return max(1, training.epochs * (math.ceil(per_epoch) if whole else math.floor(per_epoch)))
