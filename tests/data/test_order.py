"""The order of an epoch: a permutation that any place can be asked of."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from digrap_scale.data.mixing import ROUND_SAMPLES, Mixture, quotas
from digrap_scale.data.order import EpochOrder, hashed, permutation
from digrap_scale.errors import ConfigError

COUNTS = st.lists(st.integers(0, 17), min_size=1, max_size=9).filter(sum)


def sequence(order: EpochOrder) -> list[tuple[int, int]]:
    return list(zip(*(part.tolist() for part in order.locate(np.arange(order.samples))), strict=True))


@settings(max_examples=150, deadline=None)
@given(
    counts=COUNTS,
    window=st.integers(0, 40),
    lanes=st.integers(1, 6),
    block=st.integers(1, 5),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
    bucketed=st.booleans(),
)
def test_every_sample_comes_once_and_places_are_independent(
    counts: list[int], window: int, lanes: int, block: int, seed: int, epoch: int, bucketed: bool
) -> None:
    options = {"window_samples": window, "lanes": lanes, "block_samples": block, "seed": seed, "epoch": epoch}
    options["lengths"] = (lambda shards, indices: (shards * 7 + indices * 5) % 11) if bucketed else None
    whole = sequence(EpochOrder(counts, **options))
    assert sorted(whole) == [(shard, i) for shard, count in enumerate(counts) for i in range(count)]
    fresh = EpochOrder(counts, **options)
    for place in reversed(range(sum(counts))):
        shard, index = fresh.locate(np.array([place]))
        assert (shard[0], index[0]) == whole[place]


def test_lanes_are_read_consecutively() -> None:
    """Without windows a lane is a piece of the tape: neighbours in a lane are neighbours in a shard."""
    order = EpochOrder([16] * 64, seed=0, epoch=0, window_samples=0, lanes=4, block_samples=8)
    samples = sequence(order)
    for lane in range(4):
        mine = [s for start in range(lane * 8, 1024, 32) for s in samples[start : start + 8]]
        assert len({shard for shard, _ in mine}) <= 64 // 4 + 1
        assert sum(b == (a[0], a[1] + 1) for a, b in zip(mine, mine[1:], strict=False)) >= 256 - 18


def test_windows_shuffle_among_neighbours_alone() -> None:
    plain = sequence(EpochOrder([1000], seed=1, epoch=0, window_samples=0))
    mixed = sequence(EpochOrder([1000], seed=1, epoch=0, window_samples=100))
    for start in range(0, 1000, 100):
        assert sorted(mixed[start : start + 100]) == sorted(plain[start : start + 100])
        assert mixed[start : start + 100] != plain[start : start + 100]


def test_batches_are_of_like_length() -> None:
    """Blocks of 8 in windows of 400: padding to the longest takes a few percent, not a third; blocks are in no order."""
    lengths = np.random.default_rng(0).integers(1, 100, size=4000)
    waste = {}
    for bucketed in (False, True):
        options = {"lengths": lambda _, indices: lengths[indices]} if bucketed else {}
        order = EpochOrder([4000], seed=0, epoch=0, window_samples=400, lanes=5, block_samples=8, **options)
        blocks = lengths[order.locate(np.arange(4000))[1]].reshape(-1, 8)
        waste[bucketed] = 1 - blocks.sum() / (blocks.max(axis=1) * 8).sum()
        longest = blocks.max(axis=1)
        assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.2
    assert waste[False] > 0.3 and waste[True] < 0.05


def test_permutations_are_even() -> None:
    """Each number is as often at each place: χ² of 20 × 20 cells, 361 degrees of freedom, within 5 σ."""
    draws = np.stack([permutation(f"x/{i}", 20) for i in range(4000)])
    cells = np.stack([np.bincount(draws[:, place], minlength=20) for place in range(20)])
    chi2 = ((cells - 200) ** 2 / 200).sum()
    assert abs(chi2 - 361) < 5 * np.sqrt(2 * 361)


def test_the_order_is_the_same_for_good() -> None:
    """Recorded once: another order would make saved runs go on with other samples than they had left."""
    assert hashed("a") == 0x40F89E395B66422F
    assert permutation("a", 10).tolist() == [5, 0, 9, 7, 4, 8, 2, 1, 3, 6]
    assert sequence(EpochOrder([3, 4], seed=7, epoch=2, window_samples=3, lanes=2, block_samples=1)) == [
        (1, 1),
        (0, 0),
        (1, 2),
        (0, 2),
        (1, 3),
        (0, 1),
        (1, 0),
    ]


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(0.1, 10), min_size=2, max_size=5), start=st.integers(0, 5000), seed=st.integers(0, 3))
def test_a_mixture_counts_right_from_any_place(weights: list[float], start: int, seed: int) -> None:
    names = [str(i) for i in range(len(weights))]
    mixture = Mixture(quotas(names, weights), seed)
    sources, before = mixture.locate(np.arange(start, start + 700))
    given_before = mixture.given(start)
    for source in range(len(weights)):
        mine = before[sources == source]
        assert mine.tolist() == list(range(given_before[source], given_before[source] + len(mine)))
    assert sum(given_before) == start
    shares = np.array(mixture.given(10 * ROUND_SAMPLES)) / (10 * ROUND_SAMPLES)
    assert np.abs(shares - np.array(weights) / sum(weights)).max() < len(weights) / ROUND_SAMPLES


def test_a_weight_too_small_is_named() -> None:
    try:
        quotas(["a", "b"], [1.0, 1e-5])
    except ConfigError as error:
        assert "data.sources: b: its weight is 1e-05 of the sum" in str(error)
    else:
        raise AssertionError("expected an error")
