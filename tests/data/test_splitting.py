"""The split: every sample where it belongs, whatever the numbers of samples, ranks, batches, and the kills between."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from digrap_scale.data.splitting import Cursor, Remainder, Span, Split, eval_batches, eval_spans

COUNTS = st.lists(st.integers(0, 17), min_size=1, max_size=9).filter(sum)
SPLITS = st.fixed_dictionaries(
    {"world_size": st.integers(1, 6), "batch_samples": st.integers(1, 5), "accumulation_steps": st.integers(1, 3)}
)
REMAINDERS = st.sampled_from(["drop", "pad", "repeat"])


def samples_in(spans: list[Span]) -> list[tuple[int, int]]:
    return [(span.shard, i) for span in spans for i in range(span.start, span.stop)]


def step(split: Split, cursor: Cursor) -> tuple[list[list[int]], Cursor]:
    """The places of one optimizer step, by micro-batch and rank, and where it leads."""
    batches = []
    for _ in range(split.accumulation_steps):
        batches += [split.places(cursor, rank).tolist() for rank in range(split.world_size)]
        cursor = split.next(cursor)
    assert cursor.part == 0
    return batches, cursor


def runs(split: Split, remainder: Remainder, samples: int) -> bool:
    return remainder != "drop" or samples >= split.step_samples


@settings(max_examples=150, deadline=None)
@given(samples=st.integers(1, 200), shape=SPLITS, remainder=REMAINDERS)
def test_an_epoch_is_even_and_exact(samples: int, shape: dict[str, int], remainder: Remainder) -> None:
    split = Split(samples, remainder=remainder, **shape)
    if not runs(split, remainder, samples):
        assert split.steps_per_epoch(samples) == 0
        return
    cursor, seen, steps = split.first(), [], 0
    while cursor.epoch == 0:
        assert split.consumed(cursor) == len(seen) or remainder == "repeat"
        batches, cursor = step(split, cursor)
        lengths = {len(batch) for batch in batches}
        assert max(lengths) - min(lengths) <= 1 if remainder == "pad" else lengths == {split.batch_samples}
        seen += [place for batch in batches for place in batch]
        steps += 1
    assert steps == split.steps_per_epoch(samples)
    assert cursor == split.first(1)
    rest = samples % split.step_samples
    if remainder == "drop":
        assert seen == list(range(samples - rest))
    elif remainder == "pad":
        assert sorted(seen) == list(range(samples))
    else:
        extra = Counter(seen) - Counter(range(samples))
        assert set(seen) == set(range(samples)) and extra.total() == (-samples) % split.step_samples


@settings(max_examples=100, deadline=None)
@given(
    samples=st.integers(1, 200),
    shapes=st.lists(SPLITS, min_size=1, max_size=4),
    remainder=REMAINDERS,
    data=st.data(),
)
def test_kills_and_other_world_sizes_lose_and_repeat_nothing(
    samples: int, shapes: list[dict[str, int]], remainder: Remainder, data: st.DataObject
) -> None:
    """After each kill, maybe within a step, another world size, batch and accumulation go on."""
    cursor, seen = None, []
    for shape in shapes:
        split = Split(samples, remainder=remainder, lanes=shape["world_size"], **shape)
        if not runs(split, remainder, samples):
            return
        cursor = split.settle(cursor or split.first())
        last = shape is shapes[-1]
        alive = 10**9 if last else data.draw(st.integers(0, 12), label="micro-batches before the kill")
        while cursor.epoch == 0 and alive > 0:
            seen += [place for rank in range(split.world_size) for place in split.places(cursor, rank).tolist()]
            lanes = cursor.lanes
            consumed, cursor = split.consumed(cursor), split.next(cursor)
            if cursor.epoch == 0:
                assert cursor.lanes == lanes and split.consumed(cursor) >= consumed
            alive -= 1
        if cursor.epoch > 0:
            break
        cursor = Cursor(0, split.consumed(cursor), 0, cursor.lanes, cursor.block_samples)
    counted = Counter(seen)
    if remainder == "drop":
        assert seen == list(range(len(seen))) and samples - len(seen) < split.step_samples
    elif remainder == "pad":
        assert sorted(seen) == list(range(samples))
    else:
        assert set(seen) == set(range(samples))
        largest = max(Split(samples, **shape).step_samples for shape in shapes)
        assert (counted - Counter(range(samples))).total() < largest


def test_a_stream_never_ends() -> None:
    split = Split(None, 2, 3)
    cursor = split.first()
    for number in range(1000):
        assert split.places(cursor, 1).tolist() == [number * 6 + 2, number * 6 + 3]
        cursor = split.next(cursor)
    assert (cursor.epoch, split.consumed(cursor)) == (0, 6000)


@settings(max_examples=150, deadline=None)
@given(counts=COUNTS, batch_samples=st.integers(1, 5), world_size=st.integers(1, 6))
def test_evaluation_sees_each_sample_once_in_order_with_equal_batches(
    counts: list[int], batch_samples: int, world_size: int
) -> None:
    options: dict[str, Any] = {"batch_samples": batch_samples, "world_size": world_size}
    seen: list[tuple[int, int]] = []
    for rank in range(world_size):
        for batch in range(eval_batches(sum(counts), **options)):
            mine = samples_in(eval_spans(counts, batch, rank=rank, **options))
            assert len(mine) <= batch_samples
            seen += mine
        assert eval_spans(counts, eval_batches(sum(counts), **options), rank=rank, **options) == []
    assert seen == [(shard, i) for shard, count in enumerate(counts) for i in range(count)]


@pytest.mark.parametrize("remainder", ["pad", "repeat"])
def test_less_than_a_step_is_a_step(remainder: Remainder) -> None:
    split = Split(3, 4, 2, remainder=remainder)
    places = [split.places(split.first(), rank).tolist() for rank in range(2)]
    assert places == ([[0], [1, 2]] if remainder == "pad" else [[0, 1, 2, 0], [1, 2, 0, 1]])
