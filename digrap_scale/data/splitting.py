"""Which samples a rank reads in which batch: pure arithmetic, the same on every rank without a message.

Training. The epochs' sequences (``order.py``) are consumed by all ranks together. An optimizer step takes the next
``world_size · accumulation_steps · batch_samples`` samples; of these, micro-batch j of rank r is the (j · world_size +
r)-th piece. Epochs end with a step, on every rank at the same one. What is left of an epoch when a whole step no longer
fits is ``data.remainder``: ``drop`` it (another part of the data each epoch), ``pad`` (one more step, its batches
shorter and as even as can be, maybe empty), or ``repeat`` (one more step, filled up from the epoch's start).

Where the next step starts is the ``Cursor``, O(1) numbers that are the same on every rank. A resume with another world
size or batch goes on from it through the same sequence; only the lanes of later epochs follow the new world size.

Evaluation. The sequence is the shards as listed. Rank r takes the r-th of ``world_size`` consecutive pieces whose
sizes differ by one at most, in batches of its order.
"""

# N samples, R ranks, A micro-batches of a step

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

Remainder = Literal["drop", "pad", "repeat"]


@dataclass(frozen=True)
class Span:
    """Samples [start, stop) of shard number ``shard``."""

    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class Cursor:
    """The micro-batch that comes next, over all ranks.

    Attributes:
        epoch: 0 is the first.
        start: samples of the epoch before the step that the micro-batch belongs to.
        part: micro-batches of the step before this one.
        lanes, block_samples: of the epoch's sequence, fixed at its start.
    """

    epoch: int
    start: int
    part: int
    lanes: int
    block_samples: int


@dataclass(frozen=True)
class Split:
    """How a training sequence is dealt out.

    Attributes:
        samples: of an epoch; None: one that never ends.
        batch_samples: of a micro-batch on one rank.
        world_size: ranks.
        accumulation_steps: micro-batches of a step.
        remainder: what happens to an epoch's last samples.
        lanes: of the epochs that begin from now on: ``world_size`` (each rank reads consecutively) or 1.
    """

    samples: int | None
    batch_samples: int
    world_size: int
    accumulation_steps: int = 1
    remainder: Remainder = "drop"
    lanes: int = 1

    @property
    def micro_samples(self) -> int:
        """Samples of a micro-batch over all ranks."""
        return self.world_size * self.batch_samples

    @property
    def step_samples(self) -> int:
        """Samples of a step over all ranks."""
        return self.micro_samples * self.accumulation_steps

    def steps_per_epoch(self, samples: int) -> int:
        """Steps that an epoch of so many samples has."""
        whole, rest = divmod(samples, self.step_samples)
        return whole + (rest > 0 and self.remainder != "drop")

    def first(self, epoch: int = 0) -> Cursor:
        """An epoch's begin."""
        return Cursor(epoch, 0, 0, self.lanes, self.batch_samples)

    def settle(self, cursor: Cursor) -> Cursor:
        """``cursor``, or the next epoch's begin if nothing of its epoch is to be read any more."""
        if self.samples is None:
            return cursor
        left = self.samples - cursor.start
        ended = left < self.step_samples if self.remainder == "drop" else left <= 0
        return self.first(cursor.epoch + 1) if ended else cursor

    def next(self, cursor: Cursor) -> Cursor:
        """The micro-batch after ``cursor``."""
        if cursor.part + 1 < self.accumulation_steps:
            return replace(cursor, part=cursor.part + 1)
        return self.settle(replace(cursor, start=cursor.start + self.step_samples, part=0))

    def consumed(self, cursor: Cursor) -> int:
        """Samples of the epoch that come before ``cursor``, over all ranks."""
        if self.samples is None or self.samples - cursor.start >= self.step_samples or self.remainder == "repeat":
            done = cursor.start + cursor.part * self.micro_samples
            return done if self.samples is None else min(done, self.samples)
        return cursor.start + self._dealt(cursor.start, cursor.part * self.world_size)

    def places(self, cursor: Cursor, rank: int) -> np.ndarray:
        """[B] int64: the places in the epoch's sequence of a rank's micro-batch; fewer, maybe none, only under ``pad``."""
        piece = cursor.part * self.world_size + rank
        if self.samples is not None and self.samples - cursor.start < self.step_samples:
            if self.remainder == "pad":
                low, high = self._dealt(cursor.start, piece), self._dealt(cursor.start, piece + 1)
                return np.arange(cursor.start + low, cursor.start + high)
            low = cursor.start + piece * self.batch_samples
            return np.arange(low, low + self.batch_samples) % self.samples
        low = cursor.start + piece * self.batch_samples
        return np.arange(low, low + self.batch_samples)

    def _dealt(self, start: int, pieces: int) -> int:
        """Of an epoch's last samples, how many lie in the first ``pieces`` pieces of the last step."""
        assert self.samples is not None
        return (self.samples - start) * pieces // (self.world_size * self.accumulation_steps)


def eval_batches(samples: int, *, batch_samples: int, world_size: int) -> int:
    """Batches of every rank in a pass of evaluation: ⌈⌈N / R⌉ / batch⌉."""
    return math.ceil(math.ceil(samples / world_size) / batch_samples)


def eval_interval(samples: int, *, rank: int, world_size: int) -> tuple[int, int]:
    """[start, stop) of the rank's samples in listed order."""
    return samples * rank // world_size, samples * (rank + 1) // world_size


def eval_spans(counts: Sequence[int], batch: int, *, batch_samples: int, rank: int, world_size: int) -> list[Span]:
    """The spans that a batch of the rank is made of; none for a batch of padding alone."""
    start, stop = eval_interval(sum(counts), rank=rank, world_size=world_size)
    low = start + batch * batch_samples
    return list(_cut(counts, low, min(low + batch_samples, stop)))


def _cut(counts: Sequence[int], start: int, stop: int) -> Iterator[Span]:
    """The spans that make up [start, stop) of the shards laid end to end."""
    at = 0
    for shard, count in enumerate(counts):
        if at >= stop:
            return
        low, high = max(start - at, 0), min(stop - at, count)
        if low < high:
            yield Span(shard, low, high)
        at += count
