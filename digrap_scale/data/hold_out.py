"""Samples that are withheld from training and measured for selection: a validation set of the training domain.

A sample is withheld where the hash of its key falls below ``fraction``: a function of (seed, key) alone, so the same
samples are withheld on every rank, after every resume, whatever the shards' order, sizes or number, and a sample never
moves when others are added. How many there are is therefore random: about ``fraction`` of all.

Manifests hold no keys: one header of 512 bytes is read for each sample, once a start, on one rank (the others are told).
"""

# n samples of a shard

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from digrap_scale.config.schema import HoldOutConfig
from digrap_scale.data.order import hashed
from digrap_scale.data.shards import ShardSet
from digrap_scale.data.tar import HEADER_BYTES, Offsets, ShardReader, plain_name, scan_checked, split_name
from digrap_scale.errors import ConfigError


def is_held_out(key: str, settings: HoldOutConfig) -> bool:
    """Whether the sample of this key is withheld."""
    return hashed(f"digrap-hold-out/{settings.seed}/{key}") < settings.fraction * 2.0**64


def held_rows(shards: ShardSet, settings: HoldOutConfig) -> list[np.ndarray]:
    """The numbers of the samples that are withheld, int64, an array a shard. Reads a header a sample.

    Raises:
        ConfigError: a shard that cannot be read; no sample is withheld, or all are.
    """
    rows = []
    for path, offsets in zip(shards.paths, shards.offsets, strict=True):
        keys = _keys(path, offsets, shards.skip)
        rows.append(np.array([i for i, key in enumerate(keys) if is_held_out(key, settings)], dtype=np.int64))
    held = sum(len(one) for one in rows)
    if not 0 < held < shards.samples:
        raise ConfigError(
            f"data.hold_out.fraction: expected a part of the {shards.samples} samples of {shards.paths[0]} …, found "
            f"{settings.fraction:g}, which withholds {held}; set another fraction or data.hold_out.seed"
        )
    return rows


def split(shards: ShardSet, rows: Sequence[np.ndarray], settings: HoldOutConfig) -> tuple[ShardSet, ShardSet]:
    """(what is trained on, what is withheld), given ``held_rows``. Shards of which nothing is left are left out."""
    kept = [np.setdiff1d(np.arange(count), held) for count, held in zip(shards.counts, rows, strict=True)]
    selection = f"hold_out {settings.fraction!r} {settings.seed}"
    return _chosen(shards, kept, f"not {selection}"), _chosen(shards, rows, selection)


def join(sets: Sequence[ShardSet]) -> ShardSet:
    """One set of the shards of several, in order."""
    return ShardSet(
        tuple(path for one in sets for path in one.paths),
        tuple(count for one in sets for count in one.counts),
        tuple(offsets for one in sets for offsets in one.offsets),
        tuple(sum_ for one in sets for sum_ in one.sums),
        selection=sets[0].selection,
    )


def _chosen(shards: ShardSet, rows: Sequence[np.ndarray], selection: str) -> ShardSet:
    parts = [
        (path, len(chosen), _Rows(path, offsets, shards.skip, chosen), sum_)
        for path, offsets, sum_, chosen in zip(shards.paths, shards.offsets, shards.sums, rows, strict=True)
        if len(chosen)
    ]
    paths, counts, offsets, sums = zip(*parts, strict=True)
    return replace(shards, paths=paths, counts=counts, offsets=offsets, sums=sums, selection=selection)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Some rows of a shard's offsets: called, it gives them, [len(rows), 3] uint64."""

    path: Path
    offsets: Offsets | None
    skip: bool
    rows: np.ndarray

    def __call__(self) -> np.ndarray:
        chosen: np.ndarray = _known(self.path, self.offsets, self.skip)[self.rows]
        return chosen


def _known(path: Path, offsets: Offsets | None, skip: bool) -> np.ndarray:
    return offsets() if offsets is not None else scan_checked(path, skip).offsets


def _keys(path: Path, offsets: Offsets | None, skip: bool) -> list[str]:
    """The keys of a shard's samples, in order. A header that is not plain (a long name) is read with its sample."""
    known = _known(path, offsets, skip)
    reader = ShardReader([path], [lambda: known])
    keys = []
    try:
        with open(path, "rb", buffering=0) as stream:
            for index, start in enumerate(known[:, 0].tolist()):
                name = plain_name(os.pread(stream.fileno(), HEADER_BYTES, start))
                keys.append(reader.read(0, index)["__key__"] if name is None else split_name(path, name)[0])
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    finally:
        reader.close()
    return keys
