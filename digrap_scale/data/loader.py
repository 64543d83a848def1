"""Shards + task → batches, the same number on every rank.

The split is in ``splitting.py``. A training loader never ends: epochs follow each other inside the workers, each
shuffled anew from seed and epoch. Where a batch stands in the run (its slot) fixes its samples and their augmentation.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from digrap_scale.data.reading import samples_of
from digrap_scale.data.shards import ShardSet
from digrap_scale.data.splitting import Span, batches_per_epoch, eval_spans, train_spans
from digrap_scale.data.tasks.base import Task
from digrap_scale.errors import ConfigError
from digrap_scale.types import Batch


@dataclass(frozen=True)
class _Failure:
    """A data error on its way from a worker process, which could only pass on a traceback."""

    problems: list[str]


@dataclass(frozen=True)
class _Place:
    """What one rank's share of the data depends on."""

    batch_samples: int
    rank: int
    world_size: int
    seed: int
    shuffle_buffer_samples: int


class _Batches(IterableDataset[Batch | _Failure]):
    """One worker's batches; ``__len__`` counts those of the whole rank in one pass."""

    def __init__(self, shards: ShardSet, task: Task, place: _Place, train: bool) -> None:
        super().__init__()
        self.shards, self.task, self.place, self.train = shards, task, place, train

    def __iter__(self) -> Iterator[Batch | _Failure]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        try:
            yield from self._train(worker, workers) if self.train else self._evaluate(worker, workers)
        except ConfigError as error:
            yield _Failure(error.problems)

    def _train(self, worker: int, workers: int) -> Iterator[Batch]:
        place = self.place
        for epoch in itertools.count():
            spans = train_spans(
                self.shards.counts,
                batch_samples=place.batch_samples,
                rank=place.rank,
                world_size=place.world_size,
                worker=worker,
                workers=workers,
                seed=place.seed,
                epoch=epoch,
            )
            samples = samples_of(
                spans,
                self.shards.paths,
                shuffle_buffer_samples=place.shuffle_buffer_samples,
                shuffle_seed=f"{place.seed}/{epoch}/{place.rank}/{worker}",
            )
            while batch := list(itertools.islice(samples, place.batch_samples)):
                yield self._collate(batch, epoch)

    def _evaluate(self, worker: int, workers: int) -> Iterator[Batch]:
        place = self.place
        batches = eval_spans(
            self.shards.counts,
            batch_samples=place.batch_samples,
            rank=place.rank,
            world_size=place.world_size,
            worker=worker,
            workers=workers,
        )
        samples = samples_of(itertools.chain.from_iterable(batches), self.shards.paths)
        for spans in batches:
            batch = list(itertools.islice(samples, sum(span.stop - span.start for span in spans)))
            if batch:
                yield self._collate(batch, epoch=0)
            else:
                yield self._padding()

    def _collate(self, samples: list[dict[str, Any]], epoch: int) -> Batch:
        for sample in samples:
            # The file's name without its folder: the same data elsewhere gives the same crops.
            name = f"{self.place.seed}/{epoch}/{Path(sample['shard']).name}/{sample['key']}"
            sample["seed"] = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
        return self.task.collate(samples)

    def _padding(self) -> Batch:
        """A batch that counts nowhere, so that this rank joins the others' collectives: labels −1, no keys."""
        first = next(shard for shard, count in enumerate(self.shards.counts) if count)
        batch = self._collate(list(samples_of([Span(first, 0, 1)], self.shards.paths)), epoch=0)
        assert batch.labels is not None  # every task's collate gives labels
        return Batch(batch.inputs, torch.full_like(batch.labels, -1), [])

    def __len__(self) -> int:
        place = self.place
        return batches_per_epoch(
            self.shards.samples, batch_samples=place.batch_samples, world_size=place.world_size, train=self.train
        )


class BatchLoader(Iterable[Batch]):
    """Batches of one rank. ``len`` is the batches of one pass: in training an epoch, though iteration never ends.

    Each ``iter`` starts at epoch 0.
    """

    def __init__(self, dataset: _Batches, workers: int) -> None:
        self._dataset = dataset
        # Its own generator: starting workers must not draw from the global one, which seeds dropout.
        generator = torch.Generator().manual_seed(dataset.place.seed)
        self._loader: DataLoader[Batch | _Failure] = DataLoader(
            dataset, batch_size=None, num_workers=workers, generator=generator, in_order=True
        )

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Batch]:
        for item in self._loader:
            if isinstance(item, _Failure):
                raise ConfigError(item.problems)
            yield item


def build_loader(
    shard_set: ShardSet,
    task: Task,
    *,
    batch_samples: int,
    rank: int,
    world_size: int,
    workers: int,
    seed: int,
    shuffle_buffer_samples: int,
    train: bool,
) -> BatchLoader:
    """Batches of this rank.

    ``train=True``: never ends; every rank yields floor(N / (world_size · batch_samples)) batches an epoch, each sample
    at most once, all batches full. ``train=False``: one pass in listed order, each sample once over all ranks, the last
    batch may be short; a rank whose samples end early yields batches of padding (labels −1, no keys) so that all ranks
    yield the same number of batches.

    Args:
        shard_set: what to read.
        task: collates samples to batches, in the worker.
        batch_samples: samples of one batch on this rank.
        workers: loader processes of this rank; 0 reads in this process.
        seed: of order and augmentation; the same on every rank.
        shuffle_buffer_samples: samples among which a worker draws in training; 0 keeps the shards' inner order.

    Raises:
        ConfigError: fewer samples than one batch on every rank; while iterating, a broken shard or sample, by name.
    """
    place = _Place(batch_samples, rank, world_size, seed, shuffle_buffer_samples)
    dataset = _Batches(shard_set, task, place, train)
    if len(dataset) == 0:
        raise ConfigError(
            f"training shards hold {shard_set.samples} samples, fewer than one batch of {batch_samples} on each of "
            f"{world_size} rank(s); lower training.global_batch_samples or add data"
        )
    return BatchLoader(dataset, workers)
