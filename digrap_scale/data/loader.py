"""Shards + task → batches, the same number on every rank.

Training never ends: epochs follow each other. The order is a function of the place in it (``order.py``), and what a
rank takes is arithmetic (``splitting.py``), so this process says which batch comes next and a worker makes it: workers
hold no state. How far the run is, is what the loader has handed out, not what workers have prefetched:

    loader = build_training_loader(…)
    for batch in loader: …            # goes on from where the loader is
    state = loader.state_dict()       # between two optimizer steps: the same on every rank, a small JSON object
    loader.load_state_dict(state)     # before iterating; any world size, batch size and number of workers

With the same world size and batch every rank then gets the batches that it would have got, in the same order. With
others the ranks together get the rest of the epoch's samples, each once. Nothing is replayed: it takes as long at the
end of an epoch as at its start.

Evaluation is one pass in listed order.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, Literal, TypeVar

from torch.utils.data import Dataset

from digrap_scale.data.order import hashed
from digrap_scale.data.reading import decode_sample
from digrap_scale.data.shards import ShardSet
from digrap_scale.data.sources import Located, Source, Sources, left_out_of
from digrap_scale.data.splitting import Cursor, Remainder, Split, eval_batches, eval_spans
from digrap_scale.data.tar import SampleError, ShardReader
from digrap_scale.data.tasks.base import Task
from digrap_scale.data.workers import Delivery, Failure, Workers
from digrap_scale.errors import CheckpointError, ConfigError
from digrap_scale.types import Batch

STATE_VERSION = 1
MAX_SHOWN_SKIPS = 20
logger = logging.getLogger(__name__)
Place = TypeVar("Place")


class _Batches(Dataset[Delivery | Failure], Generic[Place]):
    """Batches by their places; every worker process has a copy, and opens its own files."""

    def __init__(self, sources: Sources, task: Task, skip: bool) -> None:
        self.sources, self.task, self.skip = sources, task, skip
        self._reader: ShardReader | None = None

    def __getitem__(self, place: Place) -> Delivery | Failure:
        try:
            return self._make(self.located(place))
        except ConfigError as error:
            return Failure(error.problems)

    def located(self, place: Place) -> list[Located]:
        """The samples of a batch."""
        raise NotImplementedError

    def _make(self, located: list[Located]) -> Delivery:
        samples: list[dict[str, Any]] = []
        skipped: list[str] = []
        for where in located:
            try:
                samples.append(self._sample(where))
            except SampleError as error:
                if not self.skip:
                    raise
                skipped += error.problems
        try:
            batch = self.task.micro_batch(samples) if samples else self._padding()
        except ConfigError:
            if not self.skip:
                raise
            batch = self._collate_good(samples, skipped)
        return Delivery(batch, skipped)

    def _collate_good(self, samples: list[dict[str, Any]], skipped: list[str]) -> Batch:
        """The batch without the samples that the task refuses."""
        good = []
        for sample in samples:
            try:
                self.task.micro_batch([sample])
                good.append(sample)
            except ConfigError as error:
                skipped += error.problems
        return self.task.micro_batch(good) if good else self._padding()

    def _sample(self, where: Located) -> dict[str, Any]:
        self._reader = self._reader or self.sources.reader()
        sample = decode_sample(self._reader.read(where.shard, where.index))
        # The file's name without its folder: the same data elsewhere gives the same crops.
        name = f"{self.sources.seed}/{where.epoch}/{os.path.basename(sample['shard'])}/{sample['key']}"
        sample["seed"] = hashed(name)
        return sample

    def _padding(self) -> Batch:
        """A batch that counts nowhere, so that this rank joins the others' collectives; made of the first good sample."""
        for shard, count in enumerate(self.sources.counts):
            for index in range(count):
                try:
                    return self.task.padding(self._sample(Located(shard, index, 0)))
                except ConfigError:
                    if not self.skip:
                        raise
        raise ConfigError(f"{self.sources.sources[0].shards.paths[0]} and the other shards: every sample is bad")


class _TrainBatches(_Batches[Cursor]):
    def __init__(self, sources: Sources, task: Task, skip: bool, split: Split, rank: int) -> None:
        super().__init__(sources, task, skip)
        self.split, self.rank = split, rank

    def located(self, place: Cursor) -> list[Located]:
        return self.sources.locate(place, self.split.places(place, self.rank))


class _EvalBatches(_Batches[int]):
    def __init__(self, sources: Sources, task: Task, batch_samples: int, rank: int, world_size: int) -> None:
        super().__init__(sources, task, skip=False)
        self._place: dict[str, int] = {"batch_samples": batch_samples, "rank": rank, "world_size": world_size}

    def located(self, place: int) -> list[Located]:
        spans = eval_spans(self.sources.counts, place, **self._place)
        return [Located(span.shard, index, 0) for span in spans for index in range(span.start, span.stop)]


class EvaluationLoader(Iterable[Batch]):
    """One rank's batches of a pass in listed order; all ranks have the same number, ``len``."""

    def __init__(self, batches: _EvalBatches, count: int, workers: Workers) -> None:
        self._batches, self._count, self._workers = batches, count, workers

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Batch]:
        for item in self._workers.run(self._batches, range(self._count), self._batches.sources.seed):
            yield item.batch


class TrainingLoader(Iterable[Batch]):
    """One rank's batches, without an end. ``len`` is those of an epoch (of a mixture: of as many samples as it has).

    Attributes:
        bad_samples: samples that this rank has skipped; after a resume, and its share of those that were skipped before.
            Rank 0 also counts what the shards' scan has left out, a problem as one.
    """

    def __init__(self, batches: _TrainBatches, max_bad_samples: int, workers: Workers) -> None:
        self._batches, self._workers = batches, workers
        self._max_bad_samples = max_bad_samples
        self._cursor = batches.split.first()
        self._world_size = batches.split.world_size
        # What the shards' scan has left out counts once, on rank 0: the ranks' numbers are summed.
        left_out = left_out_of(batches.sources.sources)
        if len(left_out) > max_bad_samples:
            raise _too_many(max_bad_samples, left_out[-1])
        self.bad_samples = len(left_out) if batches.rank == 0 else 0

    def __len__(self) -> int:
        split = self._batches.split
        return split.steps_per_epoch(self._batches.sources.samples) * split.accumulation_steps

    def __iter__(self) -> Iterator[Batch]:
        for item in self._workers.run(self._batches, self._ahead(), self._batches.sources.seed):
            # First the place, then the batch: whoever holds the batch finds it counted.
            self._cursor = self._batches.split.next(self._cursor)
            self._count_bad(item.skipped)
            yield item.batch

    def _ahead(self) -> Iterator[Cursor]:
        """The places that workers are sent to, ahead of what is handed out."""
        cursor = self._cursor
        while True:
            yield cursor
            cursor = self._batches.split.next(cursor)

    def _count_bad(self, skipped: list[str]) -> None:
        for problem in skipped:
            self.bad_samples += 1
            if self.bad_samples <= MAX_SHOWN_SKIPS:
                logger.warning("sample skipped: %s", problem)
            if self.bad_samples > self._max_bad_samples:
                raise _too_many(self._max_bad_samples, problem)

    def source_samples(self) -> dict[str, int]:
        """Samples that each source of a mixture has given so far, over all ranks; {} where there is one source."""
        return self._batches.sources.given(self._batches.split.consumed(self._cursor))

    def state_dict(self, bad_samples: int | None = None) -> dict[str, Any]:
        """How far the run is: the same on every rank, and enough for any other world size. Take it between two steps.

        Args:
            bad_samples: the sum of the ranks' ``bad_samples``; None: this rank is the only one, or they are not to go on.

        ``epoch`` and ``position`` (samples of the epoch that all ranks together were handed) say where,
        ``lanes`` and ``block_samples`` how the present epoch is dealt out, the others what they are true of.
        """
        return {
            "version": STATE_VERSION,
            "epoch": self._cursor.epoch,
            "position": self._batches.split.consumed(self._cursor),
            "lanes": self._cursor.lanes,
            "block_samples": self._cursor.block_samples,
            "bad_samples": bad_samples if bad_samples is not None else self.bad_samples if self._world_size == 1 else 0,
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from ``state`` with the next ``iter``.

        Raises:
            CheckpointError: it is of other shards or of another order, or no such state.
        """
        if state.get("version") != STATE_VERSION:
            raise CheckpointError(f"data state: version {state.get('version')!r}, expected {STATE_VERSION}")
        names = {
            "seed": "run.seed",
            "window_samples": "data.shuffle_buffer_samples",
            "bucketed": "data.bucket_by_length",
            "shards": "training shards",
            "content": "content of the training shards",
        }
        for key, expected in self._identity().items():
            if key == "content" and (expected is None or state.get(key) is None):
                continue  # shards without a manifest, or a state of an older version
            if state.get(key) != expected:
                raise CheckpointError(
                    f"data state: {names[key]}: the checkpoint was saved with {state.get(key)!r}, found {expected!r}; "
                    "its place in the epoch is no place in this order: restore what has changed"
                )
        place = [state.get(key) for key in ("epoch", "position", "lanes", "block_samples")]
        if not all(isinstance(value, int) and value >= low for value, low in zip(place, (0, 0, 1, 1), strict=True)):
            raise CheckpointError(f"data state: expected epoch, position, lanes and block_samples, found {place}")
        epoch, position, lanes, block_samples = (int(value) for value in place if value is not None)
        bad = state.get("bad_samples", 0)  # states of older versions lack it
        if not isinstance(bad, int) or bad < 0:
            raise CheckpointError(f"data state: expected bad_samples of 0 or more, found {bad!r}")
        self._cursor = self._batches.split.settle(Cursor(epoch, position, 0, lanes, block_samples))
        # Dealt out evenly: their sum goes on, and so does the cap, whatever the number of ranks.
        rank, ranks = self._batches.rank, self._world_size
        self.bad_samples = bad * (rank + 1) // ranks - bad * rank // ranks

    def _identity(self) -> dict[str, Any]:
        """What a place depends on."""
        sources = self._batches.sources
        return {
            "seed": sources.seed,
            "window_samples": sources.window_samples,
            "bucketed": sources.bucketed,
            "shards": f"{sources.samples} samples, {sources.fingerprint()}",
            "content": sources.content(),
        }


def _too_many(expected: int, problem: str) -> ConfigError:
    return ConfigError(
        f"data.max_bad_samples: expected at most {expected} bad samples on a rank, found one more: {problem}"
    )


def build_training_loader(
    shards: ShardSet | Sequence[Source],
    task: Task,
    *,
    batch_samples: int,
    rank: int,
    world_size: int,
    workers: int,
    seed: int,
    shuffle_buffer_samples: int = 0,
    order: Literal["local", "global"] = "local",
    remainder: Remainder = "drop",
    accumulation_steps: int = 1,
    on_bad_sample: Literal["error", "skip"] = "error",
    max_bad_samples: int = 100,
    prefetch_batches: int = 2,
    bucket_by_length: bool = False,
) -> TrainingLoader:
    """Training batches of this rank, without an end.

    Every rank has the same number of batches an epoch; each sample comes once an epoch over all ranks, but for
    ``remainder``.

    Args:
        shards: what to read; several named sources are mixed by their weights.
        task: collates samples to batches, in the worker.
        batch_samples: samples of one batch on this rank.
        workers: loader processes of this rank; 0 reads in this process.
        seed: of order and augmentation; the same on every rank.
        shuffle_buffer_samples: samples that are shuffled among each other; 0 keeps the shards' inner order.
        order: ``local``: each rank reads consecutive parts of the shards; ``global``: the sequence over all ranks does
            not depend on their number. Neither depends on ``workers``. A mixture's is always global.
        remainder: what happens to an epoch's last samples; see ``splitting.py``.
        accumulation_steps: batches of an optimizer step; epochs end with a step.
        on_bad_sample: ``skip``: a sample that cannot be decoded is left out of its batch and counted.
        max_bad_samples: bad samples on this rank that are put up with.
        prefetch_batches: batches that each worker makes ahead.
        bucket_by_length: samples of a batch (of a step, if ``global``) have texts of about one length.

    Raises:
        ConfigError: fewer samples than one step, and ``remainder`` is ``drop``; while iterating, a broken shard or
            sample, by name.
    """
    named = [Source("", shards)] if isinstance(shards, ShardSet) else list(shards)
    sources = Sources(named, seed=seed, window_samples=shuffle_buffer_samples, bucketed=bucket_by_length)
    split = Split(
        sources.epoch_samples,
        batch_samples,
        world_size,
        accumulation_steps=accumulation_steps,
        remainder=remainder,
        lanes=world_size if order == "local" and sources.epoch_samples is not None else 1,
    )
    if sources.epoch_samples is not None and split.steps_per_epoch(sources.samples) == 0:
        raise ConfigError(
            f"training shards hold {sources.samples} samples, fewer than one step of {accumulation_steps} batch(es) of "
            f"{batch_samples} on each of {world_size} rank(s); lower training.global_batch_samples, add data, or set "
            "data.remainder"
        )
    batches = _TrainBatches(sources, task, on_bad_sample == "skip", split, rank)
    return TrainingLoader(batches, max_bad_samples, Workers(workers, prefetch_batches))


def build_evaluation_loader(
    shards: ShardSet, task: Task, *, batch_samples: int, rank: int, world_size: int, workers: int, seed: int = 0
) -> EvaluationLoader:
    """One pass in listed order, each sample once over all ranks.

    The last batch may be short; a rank whose samples end early yields batches of padding (labels −1, no keys) so that
    all ranks yield the same number of batches. A bad sample is an error, by name: a score over fewer is another score.

    Args:
        shards: what to read.
        task: collates samples to batches, in the worker.
        batch_samples: samples of one batch on this rank.
        workers: loader processes of this rank; 0 reads in this process.
        seed: of what the task may draw from samples' seeds.
    """
    sources = Sources([Source("", shards)], seed=seed, window_samples=0)
    count = eval_batches(sources.samples, batch_samples=batch_samples, world_size=world_size)
    return EvaluationLoader(_EvalBatches(sources, task, batch_samples, rank, world_size), count, Workers(workers))
