"""What a training loader reads: one source of shards in epochs, or several in their shares."""

# K places asked for

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from digrap_scale.data.mixing import Mixture, quotas
from digrap_scale.data.order import EpochOrder
from digrap_scale.data.shards import ShardSet
from digrap_scale.data.splitting import Cursor
from digrap_scale.data.tar import ShardReader
from digrap_scale.errors import ConfigError

_KEPT_EPOCHS = 4


@dataclass(frozen=True)
class Source:
    """Shards with a name and a weight among others."""

    name: str
    shards: ShardSet
    weight: float = 1.0


@dataclass(frozen=True)
class Located:
    """Where a sample is, and which pass over its source it belongs to."""

    shard: int
    index: int
    epoch: int


def left_out_of(sources: Iterable[Source]) -> list[str]:
    """What the scans of their shards have left out, a line each."""
    return [problem for source in sources for problem in source.shards.skipped]


class Sources:
    """All shards of all sources under one numbering, and the sequence in which their samples are consumed.

    Args:
        sources: one or more; several are mixed.
        seed: draws the order.
        window_samples: see ``order.py``.
        bucketed: sort windows by the samples' text, see ``order.py``; of one source.

    Attributes:
        counts: samples of each shard.

    Raises:
        ConfigError: a source of a mixture has too small a weight; ``bucketed``, and where a shard's samples are is unknown.
    """

    def __init__(self, sources: Sequence[Source], *, seed: int, window_samples: int, bucketed: bool = False) -> None:
        self.sources = tuple(sources)
        self.counts = [count for source in sources for count in source.shards.counts]
        self.seed, self.window_samples, self.bucketed = seed, window_samples, bucketed
        if bucketed:
            _refuse_unknown_lengths(self.sources)
        self._first_shards = np.cumsum([0, *(len(source.shards.counts) for source in sources)])
        self._mixture: Mixture | None = None
        if len(sources) > 1:
            shares = quotas([source.name for source in sources], [source.weight for source in sources])
            self._mixture = Mixture(shares, seed)
        self._orders: OrderedDict[tuple[int, int, int, int], EpochOrder] = OrderedDict()

    @property
    def samples(self) -> int:
        """Samples of all sources together."""
        return sum(self.counts)

    @property
    def epoch_samples(self) -> int | None:
        """Samples of an epoch of the sequence; None for a mixture, whose sources have epochs of their own."""
        return self.samples if self._mixture is None else None

    def fingerprint(self) -> str:
        """Tells whether a saved place means the same samples: names, files (without folders), counts, weights."""
        content: list[list[object]] = [
            [s.name, s.weight, [path.name for path in s.shards.paths], list(s.shards.counts)] for s in self.sources
        ]
        for entry, source in zip(content, self.sources, strict=True):
            entry += [source.shards.selection] if source.shards.selection else []
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def content(self) -> str | None:
        """Tells shards of the same names and counts apart, by their manifests' sums; None where one has no manifest."""
        sums = [sum_ for source in self.sources for sum_ in source.shards.sums]
        return None if None in sums else hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]

    def locate(self, cursor: Cursor, places: np.ndarray) -> list[Located]:
        """The samples at ``places`` [K] of the cursor's epoch."""
        if self._mixture is None:
            return self._in_epoch(0, cursor.epoch, places, cursor.lanes, cursor.block_samples)
        of_place, before = self._mixture.locate(places)
        found: dict[int, Located] = {}
        for number, source in enumerate(self.sources):
            epochs, in_epoch = np.divmod(before, source.shards.samples)
            for epoch in np.unique(epochs[of_place == number]):
                mine = np.flatnonzero((of_place == number) & (epochs == epoch))
                located = self._in_epoch(number, int(epoch), in_epoch[mine], 1, 1)
                found.update(zip(mine.tolist(), located, strict=True))
        return [found[i] for i in range(len(places))]

    def given(self, consumed: int) -> dict[str, int]:
        """How many samples each source of a mixture has given when ``consumed`` are consumed; {} for one source."""
        if self._mixture is None:
            return {}
        return dict(zip([source.name for source in self.sources], self._mixture.given(consumed), strict=True))

    def reader(self) -> ShardReader:
        """Reads the shards by the numbers that ``locate`` gives."""
        sets = [source.shards for source in self.sources]
        paths = [path for one in sets for path in one.paths]
        offsets = [places for one in sets for places in one.offsets]
        return ShardReader(paths, offsets, skip=any(one.skip for one in sets))

    def _in_epoch(self, source: int, epoch: int, places: np.ndarray, lanes: int, block: int) -> list[Located]:
        shards, indices = self._order(source, epoch, lanes, block).locate(places)
        shards = shards + self._first_shards[source]
        return [Located(shard, index, epoch) for shard, index in zip(shards.tolist(), indices.tolist(), strict=True)]

    def _order(self, source: int, epoch: int, lanes: int, block: int) -> EpochOrder:
        key = (source, epoch, lanes, block)
        if key not in self._orders:
            self._orders[key] = EpochOrder(
                self.sources[source].shards.counts,
                seed=self.seed,
                epoch=epoch,
                window_samples=self.window_samples,
                lanes=lanes,
                block_samples=block,
                name=self.sources[source].name,
                lengths=self._text_bytes if self.bucketed else None,
            )
            if len(self._orders) > _KEPT_EPOCHS + len(self.sources):
                self._orders.popitem(last=False)
        self._orders.move_to_end(key)
        return self._orders[key]

    def _text_bytes(self, shards: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """[K] bytes of the samples' json, txt and cls, as the manifest has them: a length that needs no reading."""
        lengths = np.empty(len(shards), dtype=np.int64)
        for shard in np.unique(shards):
            offsets = self.sources[0].shards.offsets[shard]
            assert offsets is not None  # refused at the start
            mine = shards == shard
            lengths[mine] = offsets()[indices[mine], 2]
        return lengths


def _refuse_unknown_lengths(sources: Sequence[Source]) -> None:
    if len(sources) > 1:
        raise ConfigError("data.bucket_by_length: expected one source, found a mixture; set it to false")
    for path, offsets in zip(sources[0].shards.paths, sources[0].shards.offsets, strict=True):
        if offsets is None:
            raise ConfigError(
                f"data.bucket_by_length: {path}: its manifest is of an older version and does not tell the samples' "
                "lengths; write it anew (digrap-scale index)"
            )
