"""The split: every sample where it belongs, whatever the numbers of shards, ranks and workers."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from digrap_scale.data.splitting import Span, batches_per_epoch, eval_spans, train_spans

COUNTS = st.lists(st.integers(0, 17), min_size=1, max_size=9).filter(sum)
SPLITS = {
    "counts": COUNTS,
    "batch_samples": st.integers(1, 5),
    "world_size": st.integers(1, 6),
    "workers": st.integers(1, 3),
}


def samples_in(spans: list[Span]) -> list[tuple[int, int]]:
    return [(span.shard, i) for span in spans for i in range(span.start, span.stop)]


@settings(max_examples=300, deadline=None)
@given(**SPLITS, seed=st.integers(0, 3), epoch=st.integers(0, 4))
def test_training_epoch_is_even_and_repeats_nothing(
    counts: list[int], batch_samples: int, world_size: int, workers: int, seed: int, epoch: int
) -> None:
    batches = batches_per_epoch(sum(counts), batch_samples=batch_samples, world_size=world_size, train=True)
    seen: list[tuple[int, int]] = []
    for rank in range(world_size):
        of_rank: list[tuple[int, int]] = []
        for worker in range(workers):
            spans = train_spans(
                counts,
                batch_samples=batch_samples,
                rank=rank,
                world_size=world_size,
                worker=worker,
                workers=workers,
                seed=seed,
                epoch=epoch,
            )
            mine = samples_in(spans)
            first = epoch * batches
            slots = [slot for slot in range(first, first + batches) if slot % workers == worker]
            assert len(mine) == len(slots) * batch_samples
            of_rank += mine
        assert len(of_rank) == batches * batch_samples
        seen += of_rank
    assert max(Counter(seen).values(), default=0) <= 1
    assert all(0 <= index < counts[shard] for shard, index in seen)
    assert sum(counts) - len(seen) < world_size * batch_samples


@settings(max_examples=300, deadline=None)
@given(**SPLITS)
def test_evaluation_sees_each_sample_once_in_order_with_equal_batches(
    counts: list[int], batch_samples: int, world_size: int, workers: int
) -> None:
    seen: list[tuple[int, int]] = []
    for rank in range(world_size):
        by_worker = [
            eval_spans(
                counts, batch_samples=batch_samples, rank=rank, world_size=world_size, worker=worker, workers=workers
            )
            for worker in range(workers)
        ]
        batches = sum(map(len, by_worker))
        assert batches == batches_per_epoch(
            sum(counts), batch_samples=batch_samples, world_size=world_size, train=False
        )
        for batch in range(batches):
            mine = samples_in(by_worker[batch % workers][batch // workers])
            assert len(mine) <= batch_samples
            seen += mine
    assert seen == [(shard, i) for shard, count in enumerate(counts) for i in range(count)]


def test_left_over_samples_change_with_the_epoch() -> None:
    options = {"batch_samples": 4, "rank": 0, "world_size": 1, "worker": 0, "workers": 1, "seed": 0}
    seen = Counter(s for epoch in range(60) for s in samples_in(train_spans([7], epoch=epoch, **options)))
    assert set(seen) == {(0, i) for i in range(7)}
    assert max(seen.values()) < 2.5 * min(seen.values())


def test_a_reader_touches_few_shards() -> None:
    options = {"batch_samples": 8, "world_size": 4, "workers": 2, "seed": 0, "epoch": 0}
    for rank in range(4):
        for worker in range(2):
            spans = train_spans([16] * 64, rank=rank, worker=worker, **options)
            assert len(spans) <= 64 // 8 + 2
