"""Several sources in one stream, each in its share, by arithmetic alone: any place of the stream can be asked for.

The stream goes in rounds of ``ROUND_SAMPLES``. In each round a source has the same quota, its weight's share; the order
within a round is drawn. So the samples that a source has given before any place follow from the place, and with them
the source's own epoch and place in it: sources of different sizes each begin anew when they are through, and in each of
its epochs a source's every sample comes exactly once.
"""

# M samples of a round, S sources, K places

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from digrap_scale.data.order import permutation
from digrap_scale.errors import ConfigError

ROUND_SAMPLES = 1000


def quotas(names: Sequence[str], weights: Sequence[float]) -> np.ndarray:
    """[S] int64: samples of each source in a round: its share of the weights, rounded by largest remainders.

    Raises:
        ConfigError: a source's share is below one sample a round.
    """
    shares = np.asarray(weights, dtype=np.float64) / sum(weights) * ROUND_SAMPLES
    result = np.floor(shares).astype(np.int64)
    missing = ROUND_SAMPLES - int(result.sum())
    result[np.argsort(result - shares, kind="stable")[:missing]] += 1
    for name, share, quota in zip(names, shares, result, strict=True):
        if quota == 0:
            raise ConfigError(
                f"data.sources: {name}: its weight is {share / ROUND_SAMPLES:.2g} of the sum, expected at least "
                f"{1 / ROUND_SAMPLES:g}"
            )
    return result


class Mixture:
    """Which source each place of the stream takes, and how many samples of that source came before."""

    def __init__(self, quotas_S: np.ndarray, seed: int) -> None:
        self._quotas, self._seed = quotas_S, seed
        self._cached: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0), np.empty(0))

    def locate(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For places [K] int64: sources [K], and samples of the same source before [K]."""
        rounds, within = np.divmod(places, ROUND_SAMPLES)
        sources, before = np.empty_like(places), np.empty_like(places)
        for number in np.unique(rounds):
            mine = rounds == number
            of_round, counted = self._round(int(number))
            sources[mine] = of_round[within[mine]]
            before[mine] = number * self._quotas[sources[mine]] + counted[within[mine]]
        return sources, before

    def given(self, place: int) -> list[int]:
        """Samples of each source before ``place``."""
        number, within = divmod(place, ROUND_SAMPLES)
        part = np.bincount(self._round(number)[0][:within], minlength=len(self._quotas))
        return (number * self._quotas + part).tolist()

    def _round(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """[M] sources of a round, and [M] samples of the same source before in this round."""
        if self._cached[0] != number:
            order = permutation(f"digrap-mixture/{self._seed}/{number}", ROUND_SAMPLES)
            sources = np.repeat(np.arange(len(self._quotas)), self._quotas)[order]
            counted = np.empty_like(sources)
            for source, quota in enumerate(self._quotas):
                counted[sources == source] = np.arange(quota)
            self._cached = (number, sources, counted)
        return self._cached[1], self._cached[2]
