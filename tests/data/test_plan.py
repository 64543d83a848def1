"""The table of an epoch's shares agrees with what loaders do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from digrap_scale.data.order import EpochOrder
from digrap_scale.data.plan import MAX_ROWS, describe_shares, worker_shares
from digrap_scale.data.splitting import Split


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(0, 17), min_size=1, max_size=9).filter(lambda counts: sum(counts) > 20),
    world_size=st.integers(2, 4),
    batch_samples=st.integers(1, 5),
    workers=st.integers(0, 3),
    seed=st.integers(0, 5),
)
def test_shares_are_those_of_the_epoch(
    counts: list[int], world_size: int, batch_samples: int, workers: int, seed: int
) -> None:
    split = Split(sum(counts), batch_samples, world_size, lanes=world_size)
    shares = worker_shares(counts, split, workers, seed)
    options = {"seed": seed, "epoch": 0, "window_samples": 7, "lanes": world_size, "block_samples": batch_samples}
    order = EpochOrder(counts, **options)
    cursor, made = split.first(), 0
    shards: list[set[int]] = [set() for _ in range(world_size)]
    samples = np.zeros((world_size, max(1, workers)), dtype=int)
    while cursor.epoch == 0:
        for rank in range(world_size):
            places = split.places(cursor, rank)
            shards[rank] |= set(order.locate(places)[0].tolist())
            samples[rank, made % max(1, workers)] += len(places)
        cursor, made = split.next(cursor), made + 1
    assert [share.samples for share in shares] == samples.reshape(-1).tolist()
    assert [share.shards for share in shares][:: max(1, workers)] == [len(touched) for touched in shards]


@pytest.mark.parametrize(("world_size", "rows"), [(4, 1 + 8), (200, 1 + MAX_ROWS + 1)])
def test_the_table_is_short(world_size: int, rows: int) -> None:
    split = Split(100_000, 8, world_size, lanes=world_size)
    lines = describe_shares(worker_shares([1000] * 100, split, 2, seed=0))
    assert len(lines) == rows
    assert lines[1].split() == ["0", "0", *lines[1].split()[2:]]
    if world_size == 200:
        assert lines[-1].startswith("  … 384 workers more: ")
