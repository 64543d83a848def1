"""Shards on disk: writing them, naming them, knowing how many samples each one holds.

A shard is a plain tar file in which a sample is ``KEY.webp|jpg|jpeg|png`` next to ``KEY.json``. The manifest
``PREFIX.manifest.json`` is written last, so a folder with a manifest holds a whole set.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import webdataset as wds
from braceexpand import braceexpand

from digrap_scale.data.reading import IMAGE_EXTENSIONS, count_samples
from digrap_scale.errors import ConfigError, SaveError

MANIFEST_VERSION = 1
_PREFIX = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_KEY = re.compile(r"[^./\\\s]([^.\\\x00-\x1f]*[^./\\\s])?")
_URL = re.compile(r"^(pipe:|[A-Za-z][A-Za-z0-9+.-]*://)")


@dataclass(frozen=True)
class ShardEntry:
    """One shard of a manifest: file name beside the manifest, samples, size in bytes, sha256 in hex."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a set of shards holds."""

    version: int
    shards: tuple[ShardEntry, ...]

    @property
    def samples(self) -> int:
        """Samples over all shards."""
        return sum(entry.samples for entry in self.shards)

    def to_json(self) -> str:
        """The file's text."""
        shards = [asdict(entry) for entry in self.shards]
        return json.dumps({"version": self.version, "shards": shards}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads a manifest.

        Raises:
            ConfigError: not JSON, of another version, or with missing or ill-typed fields.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["version"] != MANIFEST_VERSION:
                raise ConfigError(f"{path}: manifest version {raw['version']!r}, expected {MANIFEST_VERSION}")
            entries = tuple(
                ShardEntry(str(e["file"]), int(e["samples"]), int(e["bytes"]), str(e["sha256"])) for e in raw["shards"]
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            found = f"{type(error).__name__}: {error}"
            raise ConfigError(f"{path}: not a shard manifest ({found}); delete or rewrite it") from error
        return cls(MANIFEST_VERSION, entries)


def _sample_members(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample as webdataset writes it; the JSON is written with sorted keys, for equal bytes."""
    key, extension = sample["key"], str(sample.get("extension", "webp")).lower()
    if not isinstance(key, str) or not _KEY.fullmatch(key) or "//" in key:
        raise ConfigError(f"sample key {key!r}: expected a relative name without dots, backslashes or outer spaces")
    if extension not in IMAGE_EXTENSIONS:
        raise ConfigError(f"sample {key}: image extension {extension!r}, expected one of {', '.join(IMAGE_EXTENSIONS)}")
    text = json.dumps(sample["meta"], sort_keys=True, ensure_ascii=False, allow_nan=False)
    return {"__key__": key, extension: bytes(sample["image"]), "json": text.encode("utf-8")}


class _Partials:
    """Opens each shard beside its final place and keeps what the manifest needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stream: IO[bytes] | None = None
        self.samples: list[int] = []
        self.files: list[str] = []

    def open(self, name: str) -> IO[bytes]:
        self.files.append(name)
        self.samples.append(0)
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
    if not _PREFIX.fullmatch(prefix):
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
            _publish(manifest, partial_folder, folder, prefix)
        finally:
            shutil.rmtree(partial_folder, ignore_errors=True)
    except OSError as error:
        raise SaveError(f"{folder}: shards {prefix}-*.tar could not be written: {error}") from error
    return manifest


def _write_partials(
    samples: Iterable[dict[str, Any]], partials: _Partials, prefix: str, samples_per_shard: int
) -> Manifest:
    seen: set[str] = set()
    # Fixed time, owner and mode: the bytes depend on the samples alone.
    fixed: dict[str, Any] = {"mtime": 0, "user": "", "group": "", "mode": 0o644, "encoder": False}
    writer = wds.ShardWriter(
        f"{prefix}-%06d.tar",
        maxcount=samples_per_shard,
        maxsize=float("inf"),
        opener=partials.open,
        post=partials.close,
        verbose=0,
        **fixed,
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
            partials.samples[-1] += 1
    if not seen:
        raise ConfigError(f"no samples for shards {prefix}-*.tar")
    entries = []
    for name, count in zip(partials.files, partials.samples, strict=True):
        path = partials.folder / name
        with open(path, "rb") as stream:
            digest = _sha256(stream)
        entries.append(ShardEntry(name, count, path.stat().st_size, digest))
    return Manifest(MANIFEST_VERSION, tuple(entries))


def _sha256(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _publish(manifest: Manifest, partial_folder: Path, folder: Path, prefix: str) -> None:
    """Moves a whole set into place: without a manifest while it is neither the old nor the new one."""
    manifest_path = folder / f"{prefix}.manifest.json"
    manifest_path.unlink(missing_ok=True)
    for stale in folder.glob(f"{glob.escape(prefix)}-[0-9][0-9][0-9][0-9][0-9][0-9].tar"):
        stale.unlink()
    for entry in manifest.shards:
        os.replace(partial_folder / entry.file, folder / entry.file)
    partial_manifest = partial_folder / manifest_path.name
    partial_manifest.write_text(manifest.to_json(), encoding="utf-8")
    os.replace(partial_manifest, manifest_path)


def expand_shards(patterns: Sequence[str]) -> list[Path]:
    """The files that brace (``{000..009}``) and glob (``*``) patterns name, in order, each once.

    Raises:
        ConfigError: a pattern that matches no file, names a URL or a pipe, or names a file that is not ``.tar``.
    """
    problems: list[str] = []
    found: dict[Path, None] = {}
    for pattern in patterns:
        if _URL.match(pattern):
            problems.append(f"shards {pattern!r}: only local files are read; copy the shards or mount their storage")
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
    """Shards in order, and how many samples each one holds.

    Attributes:
        paths: the tar files.
        counts: samples of each.
    """

    paths: tuple[Path, ...]
    counts: tuple[int, ...]

    @property
    def samples(self) -> int:
        """Samples over all shards."""
        return sum(self.counts)

    @classmethod
    def open(cls, patterns: Sequence[str]) -> ShardSet:
        """Expands the patterns and counts samples.

        Counts come from a manifest in the shard's folder if it lists the file with its present size; other shards are
        counted by walking through their headers once.

        Raises:
            ConfigError: see ``expand_shards``; a tar or a manifest that cannot be read; no sample at all.
        """
        paths = expand_shards(patterns)
        known: dict[tuple[Path, str], ShardEntry] = {}
        for parent in dict.fromkeys(path.parent for path in paths):
            for manifest_path in sorted(parent.glob("*.manifest.json")):
                known.update(((parent, entry.file), entry) for entry in Manifest.read(manifest_path).shards)
        counts = []
        for path in paths:
            entry = known.get((path.parent, path.name))
            if entry is not None and entry.bytes == path.stat().st_size:
                counts.append(entry.samples)
            else:
                counts.append(count_samples(path))
        if sum(counts) == 0:
            raise ConfigError(f"shards {list(patterns)}: no sample in {len(paths)} file(s)")
        return cls(tuple(paths), tuple(counts))
