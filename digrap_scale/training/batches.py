"""A run's training data, as its config has them: sources, batches of this rank, steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from digrap_scale.config import Config
from digrap_scale.data.fetch import open_shards
from digrap_scale.data.hold_out import held_rows, join, split
from digrap_scale.data.loader import MAX_SHOWN_SKIPS, TrainingLoader, build_training_loader
from digrap_scale.data.plan import describe_shares, worker_shares
from digrap_scale.data.shards import ShardSet
from digrap_scale.data.sources import Source, left_out_of
from digrap_scale.data.splitting import Split
from digrap_scale.data.tasks.base import Task
from digrap_scale.sharding.engine import Engine, portions
from digrap_scale.training.setup import Place
from digrap_scale.types import Batch

Once = Callable[[Callable[[], list[np.ndarray]]], list[np.ndarray]]


@dataclass(frozen=True)
class TrainingData:
    """The training shards, opened.

    Attributes:
        sources: what is trained on: ``data.train`` as one source, or ``data.sources``.
        validation: what ``data.hold_out`` withholds of all sources; None without it.
    """

    sources: list[Source]
    validation: ShardSet | None


def open_training_data(config: Config, once: Once = lambda action: action()) -> TrainingData:
    """The run's training shards; with ``data.hold_out`` it reads a header a sample.

    Args:
        once: does what need not be done on every rank, and gives the result on all; by default on this one.

    Raises:
        ConfigError: see ``open_shards`` and ``held_rows``.
    """
    data = config.data
    skip = data.on_bad_sample == "skip"
    listed = [("train", data.train, 1.0)] if data.train else [(s.name, s.shards, s.weight) for s in data.sources]
    sources, withheld = [], []
    for name, patterns, weight in listed:
        shards = open_shards(patterns, data, skip=skip)
        if data.hold_out is not None:
            rows = once(partial(held_rows, shards, data.hold_out))
            shards, held = split(shards, rows, data.hold_out)
            withheld.append(held)
        sources.append(Source(name, shards, weight))
    return TrainingData(sources, join(withheld) if withheld else None)


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
        bucket_by_length=options.bucket_by_length,
        remainder=options.remainder,
        on_bad_sample=options.on_bad_sample,
        max_bad_samples=options.max_bad_samples,
    )


def forwards(batch: Batch, task: Task, config: Config, place: Place) -> list[tuple[Batch, float]]:
    """The forwards that a micro-batch takes, the same number on every rank, and each one's share of its mean loss.

    Without budgets it is one. With them, a rank that needs fewer than another goes on with forwards that count nowhere:
    sharded weights are gathered, and gradients reduced, by all ranks together. Collective with budgets.
    """
    if config.data.max_forward_tokens is None and config.data.max_forward_images is None:
        return [(batch, 1.0)]
    parts = [replace(batch, rest=[]), *batch.rest]
    samples = sum(len(part.keys) for part in parts)
    shares = [len(part.keys) / max(samples, 1) for part in parts]
    missing = place.largest(len(parts)) - len(parts)
    return [*zip(parts, shares, strict=True), *[(task.emptied(parts[0]), 0.0)] * missing]


def data_counters(loader: TrainingLoader, config: Config, place: Place) -> dict[str, Any]:
    """What a line of metrics says of the data: bad samples over all ranks (``skip``), samples of each source (a mixture).

    Collective where bad samples are skipped.
    """
    counters: dict[str, Any] = {}
    if config.data.on_bad_sample == "skip":
        bad = torch.tensor(loader.bad_samples, dtype=torch.int64, device=place.device)
        place.sum_(bad)
        counters["bad_samples"] = int(bad)
    if given := loader.source_samples():
        counters["source_samples"] = given
    return counters


def describe_data(config: Config, world_size: int, sources: list[Source]) -> list[str]:
    """An epoch's steps, and what each worker of ``world_size`` ranks reads of it, a line each.

    Raises:
        ConfigError: the batches do not divide among so many ranks.
    """
    training, data = config.training, config.data
    micro, accumulation_steps = portions(training, world_size)
    counts = [count for source in sources for count in source.shards.counts]
    split = Split(
        sum(counts),
        micro,
        world_size,
        accumulation_steps=accumulation_steps,
        remainder=data.remainder,
        lanes=world_size if data.order == "local" else 1,
    )
    lines = [f"data: {s.name}: {s.shards.samples} samples in {len(s.shards.counts)} shards" for s in sources]
    lines += skipped_lines(sources)
    steps, left = split.steps_per_epoch(sum(counts)), sum(counts) % training.global_batch_samples
    what = {"drop": "left out", "pad": "in a smaller step", "repeat": "in a step filled up"}[data.remainder]
    rest = f", {left} samples of it {what}" if left and not data.sources else ""
    lines.append(f"data: {steps} steps an epoch of {training.global_batch_samples} samples{rest}")
    readers, shards = world_size * max(1, data.workers), len(counts)
    if data.order == "local" and readers > shards:
        lines.append(
            f"data: {readers} loaders ({world_size} ranks × {max(1, data.workers)}) share {shards} shards: several read the same "
            f"file at a time; {readers} shards or more would give each its own"
        )
    return lines + describe_shares(worker_shares(counts, split, data.workers, config.run.seed))


def skipped_lines(sources: list[Source]) -> list[str]:
    """What was found broken in the shards and is left out, a line each; empty if nothing was."""
    problems = left_out_of(sources)
    more = len(problems) - MAX_SHOWN_SKIPS
    return [f"skipped: {problem}" for problem in problems[:MAX_SHOWN_SKIPS]] + (
        [f"skipped: … and {more} more problems of the shards"] if more > 0 else []
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
