"""Shards on disk: writing them, naming them, knowing how many samples each one holds.

A shard is a plain tar file in which a sample's members, ``KEY.webp|jpg|jpeg|png`` and ``KEY.json``, stand next to each
other. Its manifest is written last, so a folder with a manifest holds a whole set.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import webdataset as wds
from braceexpand import braceexpand

from digrap_scale.data.manifest import MANIFEST_SUFFIX, Manifest, ShardEntry, StoredOffsets, index_shards
from digrap_scale.data.tar import IMAGE_EXTENSIONS, Offsets, scan_checked
from digrap_scale.errors import ConfigError, SaveError

PREFIX = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_KEY = re.compile(r"[^./\\\s]([^.\\\x00-\x1f]*[^./\\\s])?")
_URL = re.compile(r"^(pipe:|[A-Za-z][A-Za-z0-9+.-]*://)")


# Fixed time, owner and mode: a shard's bytes depend on its samples alone.
FIXED_MEMBER_FIELDS: dict[str, Any] = {"mtime": 0, "user": "", "group": "", "mode": 0o644, "encoder": False}


def check_key(key: object) -> str | None:
    """What is wrong with a sample's key, if anything."""
    if isinstance(key, str) and _KEY.fullmatch(key) and "//" not in key:
        return None
    return f"sample key {key!r}: expected a relative name without dots, backslashes or outer spaces"


def _sample_members(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample as webdataset writes it; the JSON is written with sorted keys, for equal bytes."""
    key, extension = sample["key"], str(sample.get("extension", "webp")).lower()
    if (problem := check_key(key)) is not None:
        raise ConfigError(problem)
    if extension not in IMAGE_EXTENSIONS:
        raise ConfigError(f"sample {key}: image extension {extension!r}, expected one of {', '.join(IMAGE_EXTENSIONS)}")
    text = json.dumps(sample["meta"], sort_keys=True, ensure_ascii=False, allow_nan=False)
    return {"__key__": key, extension: bytes(sample["image"]), "json": text.encode("utf-8")}


class _Partials:
    """Opens each shard beside its final place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stream: IO[bytes] | None = None
        self.files: list[str] = []

    def open(self, name: str) -> IO[bytes]:
        self.files.append(name)
        self.stream = open(self.folder / name, "wb")
        return self.stream

    def close(self, _name: str) -> None:
        if self.stream is not None:
            self.stream.flush()
            os.fsync(self.stream.fileno())
            self.stream.close()
            self.stream = None


def write_shards(
    samples: Iterable[dict[str, Any]], folder: str | Path, *, prefix: str, samples_per_shard: int
) -> Manifest:
    """Writes samples as ``PREFIX-000000.tar`` … and ``PREFIX.manifest.json``; equal samples give equal bytes.

    Everything is written in a hidden folder beside and moved at the end, the manifest last. An earlier set of the same
    prefix in this folder is replaced.

    Args:
        samples: dicts of ``key`` (unique), ``image`` (encoded), ``extension`` (default ``webp``), ``meta`` (JSON).
        folder: where to; made if it is missing.
        prefix: letters, digits, ``. _ -``.
        samples_per_shard: samples of every shard but the last.

    Raises:
        ConfigError: no samples, a bad or repeated key, an unknown extension, metadata that JSON cannot hold.
        SaveError: the disk refuses.
    """
    folder = Path(folder)
    if not PREFIX.fullmatch(prefix):
        raise ConfigError(f"shard prefix {prefix!r}: expected letters, digits, '.', '_' or '-'")
    if samples_per_shard < 1:
        raise ConfigError(f"samples_per_shard {samples_per_shard}: expected 1 or more")
    partial_folder = folder / f".{prefix}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir()
        try:
            manifest = _write_partials(samples, _Partials(partial_folder), prefix, samples_per_shard)
            publish_shards(manifest, partial_folder, folder, prefix)
        finally:
            shutil.rmtree(partial_folder, ignore_errors=True)
    except OSError as error:
        raise SaveError(f"{folder}: shards {prefix}-*.tar could not be written: {error}") from error
    return manifest


def _write_partials(
    samples: Iterable[dict[str, Any]], partials: _Partials, prefix: str, samples_per_shard: int
) -> Manifest:
    seen: set[str] = set()
    writer = wds.ShardWriter(
        f"{prefix}-%06d.tar",
        maxcount=samples_per_shard,
        maxsize=float("inf"),
        opener=partials.open,
        post=partials.close,
        verbose=0,
        **FIXED_MEMBER_FIELDS,
    )
    with writer:
        for sample in samples:
            key = sample.get("key")
            if key in seen:
                raise ConfigError(f"sample key {key!r} comes twice; keys must be unique")
            seen.add(str(key))
            try:
                writer.write(_sample_members(sample))
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(f"sample {key!r} cannot be written: {type(error).__name__}: {error}") from error
    if not seen:
        raise ConfigError(f"no samples for shards {prefix}-*.tar")
    # Counted and summed from the files: what the disk has, not what was meant to be written.
    return index_shards([partials.folder / name for name in partials.files], prefix)[0]


def publish_shards(manifest: Manifest, partial_folder: Path, folder: Path, prefix: str) -> None:
    """Moves a whole set into place: without a manifest while it is neither the old nor the new one."""
    manifest_path = folder / f"{prefix}{MANIFEST_SUFFIX}"
    manifest_path.unlink(missing_ok=True)
    for stale in folder.glob(f"{glob.escape(prefix)}-[0-9][0-9][0-9][0-9][0-9][0-9].tar"):
        stale.unlink()
    assert manifest.offsets is not None  # a new manifest always has them
    for name in (*(entry.file for entry in manifest.shards), manifest.offsets.file, manifest_path.name):
        os.replace(partial_folder / name, folder / name)


def expand_shards(patterns: Sequence[str]) -> list[Path]:
    """The files that brace (``{000..009}``) and glob (``*``) patterns name, in order, each once.

    Raises:
        ConfigError: a pattern that matches no file, names a URL or a pipe, or names a file that is not ``.tar``.
    """
    problems: list[str] = []
    found: dict[Path, None] = {}
    for pattern in patterns:
        if _URL.match(pattern):
            problems.append(
                f"shards {pattern!r}: only local files are read; copy the shards, mount their storage, or set "
                "data.allow_commands: true to fetch pipe: and https: sources"
            )
            continue
        try:
            expanded = list(braceexpand(pattern))
        except ValueError:  # braceexpand's error for unbalanced braces
            problems.append(f"shards {pattern!r}: the braces are not balanced")
            continue
        for name in expanded:
            matches = [name] if Path(name).is_file() else sorted(m for m in glob.glob(name) if Path(m).is_file())
            if not matches:
                problems.append(f"shards {pattern!r}: no file matches" + (f" {name!r}" if name != pattern else ""))
                break
            for match in matches:
                if not match.endswith(".tar"):
                    problems.append(f"shards {pattern!r}: {match} is not a .tar file")
                    break
                found[Path(match)] = None
    if not patterns:
        problems.append("shards: the list of patterns is empty")
    if problems:
        raise ConfigError(problems)
    return list(found)


@dataclass(frozen=True)
class ShardSet:
    """Shards in order, how many samples each one holds, and where these lie.

    Attributes:
        paths: the tar files.
        counts: samples of each.
        offsets: of each, as far as they are known without walking through it; see ``ShardScan.offsets``.
        sums: sha256 of each in hex, by its manifest; None without one.
        skipped: what was found broken and is not counted, a line each.
        skip: whether broken parts are left out.
        selection: what was chosen of the files' samples, in words; empty: all of them.
    """

    paths: tuple[Path, ...]
    counts: tuple[int, ...]
    offsets: tuple[Offsets | None, ...]
    sums: tuple[str | None, ...]
    skipped: tuple[str, ...] = ()
    skip: bool = False
    selection: str = ""

    @property
    def samples(self) -> int:
        """Samples over all shards."""
        return sum(self.counts)

    @classmethod
    def open(cls, patterns: Sequence[str], *, skip: bool = False) -> ShardSet:
        """Expands the patterns and counts samples.

        Counts and offsets come from a manifest in the shard's folder; shards that no manifest lists are counted by
        walking through their headers once.

        Args:
            patterns: see ``expand_shards``.
            skip: leave out and name in ``skipped`` what is broken in shards without a manifest.

        Raises:
            ConfigError: see ``expand_shards``; a tar or a manifest that cannot be read, or that has not the size that
                its manifest says; no sample at all. Every problem of every shard.
        """
        paths = expand_shards(patterns)
        known: dict[Path, tuple[ShardEntry, StoredOffsets | None]] = {}
        for parent in dict.fromkeys(path.parent for path in paths):
            for manifest_path in sorted(parent.glob(f"*{MANIFEST_SUFFIX}")):
                known.update(_listed(manifest_path))
        counts: list[int] = []
        offsets: list[Offsets | None] = []
        sums: list[str | None] = []
        problems: list[str] = []
        skipped: list[str] = []
        for path in paths:
            try:
                if path in known:
                    entry, stored = known[path]
                    _same_size(path, entry)
                    counts.append(entry.samples)
                    offsets.append(stored)
                    sums.append(entry.sha256)
                else:
                    scan = scan_checked(path, skip)
                    skipped += scan.problems
                    counts.append(len(scan.offsets))
                    offsets.append(_Held(scan.offsets))
                    sums.append(None)
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)
        if sum(counts) == 0:
            raise ConfigError(f"shards {list(patterns)}: no sample in {len(paths)} file(s)")
        return cls(tuple(paths), tuple(counts), tuple(offsets), tuple(sums), tuple(skipped), skip)


@dataclass(frozen=True, eq=False)
class _Held:
    """Offsets that a walk has found."""

    offsets: np.ndarray

    def __call__(self) -> np.ndarray:
        return self.offsets


def _listed(manifest_path: Path) -> dict[Path, tuple[ShardEntry, StoredOffsets | None]]:
    """What a manifest says of each of its files."""
    manifest = Manifest.read(manifest_path)
    folder = manifest_path.parent
    listed: dict[Path, tuple[ShardEntry, StoredOffsets | None]] = {}
    first = 0
    for entry in manifest.shards:
        stored = None
        if manifest.offsets is not None:
            file = folder / manifest.offsets.file
            stored = StoredOffsets(file, first, entry.samples, manifest.samples, entry.bytes)
        listed[folder / entry.file] = entry, stored
        first += entry.samples
    return listed


def _same_size(path: Path, entry: ShardEntry) -> None:
    size = path.stat().st_size
    if size != entry.bytes:
        raise ConfigError(
            f"{path}: expected {entry.bytes} bytes by its manifest, found {size}: it was cut off or written anew; "
            "restore it, or write the manifest anew (digrap-scale index)"
        )
