"""How an epoch is dealt out: batches, samples and shards of each rank's workers, before anything is read."""

# W workers of a rank

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from digrap_scale.data.order import EpochOrder
from digrap_scale.data.splitting import Split

MAX_ROWS = 16


@dataclass(frozen=True)
class WorkerShare:
    """What one worker does in the first epoch.

    Attributes:
        batches: that it makes.
        samples: that it reads at most; under ``pad`` the last batch may be smaller.
        shards: that its rank reads from, all its workers alike.
    """

    rank: int
    worker: int
    batches: int
    samples: int
    shards: int


def worker_shares(counts: Sequence[int], split: Split, workers: int, seed: int) -> list[WorkerShare]:
    """Every worker's share of the first epoch; no worker process counts as one.

    Args:
        counts: samples of each shard.
        split: the training split.
        workers: of a rank.
        seed: of the order.
    """
    batches = split.steps_per_epoch(sum(counts)) * split.accumulation_steps
    order = EpochOrder(
        counts, seed=seed, epoch=0, window_samples=0, lanes=split.lanes, block_samples=split.batch_samples
    )
    shares = []
    for rank in range(split.world_size):
        shards = order.lane_shards(rank) if split.lanes > 1 else sum(count > 0 for count in counts)
        for worker in range(max(1, workers)):
            own = len(range(worker, batches, max(1, workers)))
            shares.append(WorkerShare(rank, worker, own, own * split.batch_samples, shards))
    return shares


def describe_shares(shares: Sequence[WorkerShare]) -> list[str]:
    """A table of ``worker_shares``; of many rows the first, and what the others lie between."""
    rows = [f"{'rank':>6}{'worker':>8}{'batches':>10}{'samples':>10}{'shards':>8}"]
    for s in shares[:MAX_ROWS]:
        rows.append(f"{s.rank:>6}{s.worker:>8}{s.batches:>10}{s.samples:>10}{s.shards:>8}")
    rest = shares[MAX_ROWS:]
    if rest:
        low, high = min(s.samples for s in rest), max(s.samples for s in rest)
        few, many = min(s.shards for s in rest), max(s.shards for s in rest)
        rows.append(f"  … {len(rest)} workers more: {low} to {high} samples each, from {few} to {many} shards")
    return rows
