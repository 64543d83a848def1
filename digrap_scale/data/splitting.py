"""Which samples a rank and a worker read: pure arithmetic on counts, the same on every rank without a message.

Training. An epoch is a virtual sequence of all samples: the shards in an order drawn from (seed, epoch), begun at a
random place and wrapped around. Rank r takes the r-th of ``world_size`` equal consecutive pieces, each a whole number
of batches; the few samples left over differ from epoch to epoch. Batch b of a rank's epoch e is slot e·B + b, and
slot i belongs to worker i mod W, because that is the order in which a DataLoader asks its workers. Each worker reads
one consecutive piece of the rank's, so that whatever the numbers of shards, ranks and workers are, no sample comes
twice in an epoch, each reader touches few shards and only cuts those at its ends, and the epochs of the workers never
mix. A slot names its epoch and place: a run can start at any slot.

Evaluation. The sequence is the shards as listed. Rank r takes the r-th of ``world_size`` consecutive pieces whose
sizes differ by one at most; worker w reads every W-th batch of it, so that batches come out in order.
"""

# N samples, R ranks, W workers, B batches of one rank in an epoch

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Samples [start, stop) of shard number ``shard``."""

    shard: int
    start: int
    stop: int


def batches_per_epoch(samples: int, *, batch_samples: int, world_size: int, train: bool) -> int:
    """Batches of every rank in one pass: floor(N / (R · batch)) in training, ⌈⌈N / R⌉ / batch⌉ in evaluation."""
    if train:
        return samples // (world_size * batch_samples)
    return math.ceil(math.ceil(samples / world_size) / batch_samples)


def train_spans(
    counts: Sequence[int],
    *,
    batch_samples: int,
    rank: int,
    world_size: int,
    worker: int,
    workers: int,
    seed: int,
    epoch: int,
) -> list[Span]:
    """One worker's part of one epoch, in reading order; its length is a whole number of batches, maybe none.

    Args:
        counts: samples of each shard.
        batch_samples: samples of a batch on one rank.
        worker: 0 ≤ worker < workers; a loader without worker processes counts as one worker.
    """
    total = sum(counts)
    per_rank = batches_per_epoch(total, batch_samples=batch_samples, world_size=world_size, train=True)
    first_slot = epoch * per_rank
    slots = [_slots_of(w, workers, first_slot, first_slot + per_rank) for w in range(workers)]
    start = (rank * per_rank + sum(slots[:worker])) * batch_samples
    length = slots[worker] * batch_samples
    if length == 0:
        return []
    rng = random.Random(f"digrap-epoch/{seed}/{epoch}")
    order = list(range(len(counts)))
    rng.shuffle(order)
    start = (start + rng.randrange(total)) % total
    stop = start + length
    spans = list(_cut(counts, order, start, min(stop, total)))
    if stop > total:
        spans += _cut(counts, order, 0, stop - total)
    return spans


def _slots_of(worker: int, workers: int, start: int, stop: int) -> int:
    """How many i in [start, stop) have i mod workers = worker."""
    return (stop - worker + workers - 1) // workers - (start - worker + workers - 1) // workers


def eval_interval(samples: int, *, rank: int, world_size: int) -> tuple[int, int]:
    """[start, stop) of the rank's samples in listed order."""
    return samples * rank // world_size, samples * (rank + 1) // world_size


def eval_spans(
    counts: Sequence[int], *, batch_samples: int, rank: int, world_size: int, worker: int, workers: int
) -> list[list[Span]]:
    """The worker's batches, each as the spans that it is made of; an empty list is a batch of padding alone."""
    total = sum(counts)
    start, stop = eval_interval(total, rank=rank, world_size=world_size)
    batches = batches_per_epoch(total, batch_samples=batch_samples, world_size=world_size, train=False)
    order = range(len(counts))
    mine = []
    for batch in range(worker, batches, workers):
        low = start + batch * batch_samples
        mine.append(list(_cut(counts, order, low, min(low + batch_samples, stop))))
    return mine


def _cut(counts: Sequence[int], order: Sequence[int], start: int, stop: int) -> Iterator[Span]:
    """The spans that make up [start, stop) of the shards laid end to end in ``order``."""
    at = 0
    for shard in order:
        if at >= stop:
            return
        low, high = max(start - at, 0), min(stop - at, counts[shard])
        if low < high:
            yield Span(shard, low, high)
        at += counts[shard]
