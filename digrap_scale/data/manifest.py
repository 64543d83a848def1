"""What a set of shards holds, written down beside it: samples, size and checksum of each shard, places of the samples.

``PREFIX.manifest.json`` is small. The samples' places are in ``PREFIX.offsets.npy``, 24 bytes a sample in the manifest's
order of shards, which every process of a node maps into the same memory. The manifest is written last: where it is, the
set is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import IO

import numpy as np

from digrap_scale.data.tar import OFFSET_COLUMNS, ShardScan, scan_checked
from digrap_scale.errors import ConfigError, PeerError, SaveError

MANIFEST_VERSION = 2
MANIFEST_SUFFIX = ".manifest.json"
OFFSETS_SUFFIX = ".offsets.npy"


@dataclass(frozen=True)
class ShardEntry:
    """One shard of a manifest: file name beside the manifest, samples, size in bytes, sha256 in hex."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class OffsetsEntry:
    """The file of the samples' places: its name beside the manifest, and its sha256 in hex."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a set of shards holds; version 1 had no offsets."""

    version: int
    shards: tuple[ShardEntry, ...]
    offsets: OffsetsEntry | None = None

    @property
    def samples(self) -> int:
        """Samples over all shards."""
        return sum(entry.samples for entry in self.shards)

    def to_json(self) -> str:
        """The file's text."""
        shards = [asdict(entry) for entry in self.shards]
        offsets = {"offsets": asdict(self.offsets)} if self.offsets is not None else {}
        return json.dumps({"version": self.version, **offsets, "shards": shards}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads a manifest.

        Raises:
            ConfigError: not JSON, of another version, or with missing or ill-typed fields.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            version = raw["version"]
            if version not in (1, MANIFEST_VERSION):
                raise ConfigError(f"{path}: manifest version {version!r}, expected {MANIFEST_VERSION} or 1")
            entries = tuple(
                ShardEntry(_name(e["file"]), int(e["samples"]), int(e["bytes"]), str(e["sha256"]))
                for e in raw["shards"]
            )
            offsets = raw["offsets"] if version == MANIFEST_VERSION else None
            place = OffsetsEntry(_name(offsets["file"]), str(offsets["sha256"])) if offsets is not None else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            found = f"{type(error).__name__}: {error}"
            raise ConfigError(f"{path}: not a shard manifest ({found}); delete or rewrite it") from error
        return cls(version, entries, place)


def _name(value: object) -> str:
    """A file's name; one that leads elsewhere is no name."""
    if not isinstance(value, str) or value in ("", ".", "..") or "/" in value or "\\" in value or "\0" in value:
        raise ValueError(f"{value!r} is not a file's name")
    return value


@dataclass(frozen=True)
class StoredOffsets:
    """Rows [first, first + count) of an offsets file; called, it gives them, mapped into memory.

    Attributes:
        path: the file.
        first, count: the shard's rows.
        rows: of the whole file, as the manifest counts its samples.
        shard_bytes: size of the shard.
    """

    path: Path
    first: int
    count: int
    rows: int
    shard_bytes: int

    def __call__(self) -> np.ndarray:
        """[count, 3] uint64. Raises: ConfigError: the file is missing, or not what the manifest says."""
        offsets = open_offsets(self.path, self.rows)[self.first : self.first + self.count]
        stops = offsets[:, 0] + offsets[:, 1]
        if len(stops) and (stops[-1] > self.shard_bytes or (offsets[1:, 0] < stops[:-1]).any()):
            raise ConfigError(
                f"{self.path}: rows {self.first} to {self.first + self.count} are not places in one shard of "
                f"{self.shard_bytes} bytes: the manifest beside it counts its shards' samples wrongly; write it anew "
                "(digrap-scale index)"
            )
        return offsets


def open_offsets(path: Path, rows: int) -> np.ndarray:
    """[rows, 3] uint64, mapped into memory.

    Raises:
        ConfigError: the file is missing, or has another shape.
    """
    try:
        written = path.stat()
        offsets = _mapped_file(path, written.st_ino, written.st_mtime_ns)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); write it anew (digrap-scale index)") from error
    if offsets.dtype != np.uint64 or offsets.shape != (rows, len(OFFSET_COLUMNS)):
        raise ConfigError(
            f"{path}: expected {rows} × {len(OFFSET_COLUMNS)} uint64 by the manifest beside it, found {offsets.shape} "
            f"{offsets.dtype}; write both anew (digrap-scale index)"
        )
    return offsets


@lru_cache(maxsize=16)
def _mapped_file(path: Path, _inode: int, _written_ns: int) -> np.ndarray:
    """One mapping for all shards of a set: one each would count (and cost page tables) once a shard."""
    mapped: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped


def sha256_of(path: Path) -> str:
    """The file's sha256 in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def index_shards(
    paths: Sequence[Path], name: str, *, skip: bool = False, processes: int = 1
) -> tuple[Manifest, list[str]]:
    """Reads shards that lie in one folder and writes their manifest there.

    Args:
        paths: the shards, in the manifest's order.
        name: of the set: NAME.manifest.json, NAME.offsets.npy.
        skip: leave out what is broken, and tell of it; otherwise it is an error.
        processes: how many shards are read at a time.

    Returns:
        The manifest, and the problems that were skipped.

    Raises:
        ConfigError: every problem of the shards; shards of several folders.
        SaveError: the disk refuses.
    """
    (folder,) = _one_folder(paths)
    scans: list[tuple[ShardEntry, ShardScan] | list[str]] = _map(partial(_read_shard, skip=skip), paths, processes)
    broken = [problem for scan in scans if isinstance(scan, list) for problem in scan]
    if broken:
        raise ConfigError(broken)
    whole = [scan for scan in scans if not isinstance(scan, list)]
    manifest_path, offsets_path = folder / f"{name}{MANIFEST_SUFFIX}", folder / f"{name}{OFFSETS_SUFFIX}"
    try:
        manifest_path.unlink(missing_ok=True)  # it must not stand beside other offsets than its own
        with replacing(offsets_path) as stream:
            np.save(stream, np.concatenate([scan.offsets for _, scan in whole]), allow_pickle=False)
        offsets = OffsetsEntry(offsets_path.name, sha256_of(offsets_path))
        manifest = Manifest(MANIFEST_VERSION, tuple(entry for entry, _ in whole), offsets)
        with replacing(manifest_path) as stream:
            stream.write(manifest.to_json().encode())
    except OSError as error:
        raise SaveError(f"{manifest_path}: cannot be written: {error}") from error
    return manifest, [problem for _, scan in whole for problem in scan.problems]


class replacing:
    """A file that takes its name when all of it is on the disk."""

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, path.with_name(f".{path.name}.partial")

    def __enter__(self) -> IO[bytes]:
        self._stream = open(self._partial, "wb")
        return self._stream

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stream as stream:
            stream.flush()
            os.fsync(stream.fileno())
        if kind is None:
            os.replace(self._partial, self._path)
        else:
            self._partial.unlink()


def check_manifest(path: Path, processes: int = 1) -> list[str]:
    """What differs between a manifest and its files, all of whose bytes are read; a line each, empty if nothing does.

    Raises:
        ConfigError: the manifest itself cannot be read.
    """
    manifest = Manifest.read(path)
    paths = [path.parent / entry.file for entry in manifest.shards]
    found = _map(_sizes_and_sums, paths, processes)
    problems = [
        problem
        for entry, shard, state in zip(manifest.shards, paths, found, strict=True)
        for problem in _differences(shard, entry, state)
    ]
    if manifest.offsets is not None:
        offsets = path.parent / manifest.offsets.file
        state = _sizes_and_sums(offsets)
        if state is None:
            problems.append(f"{offsets}: missing")
        elif state[1] != manifest.offsets.sha256:
            problems.append(f"{offsets}: expected sha256 {manifest.offsets.sha256}, found {state[1]}")
    return problems


def _differences(path: Path, entry: ShardEntry, state: tuple[int, str] | None) -> list[str]:
    if state is None:
        return [f"{path}: missing"]
    size, digest = state
    if size != entry.bytes:
        return [f"{path}: expected {entry.bytes} bytes, found {size}"]
    if digest != entry.sha256:
        return [f"{path}: expected sha256 {entry.sha256}, found {digest}"]
    samples = len(scan_checked(path, skip=True).offsets)
    return [f"{path}: expected {entry.samples} samples, found {samples}"] if samples != entry.samples else []


def _sizes_and_sums(path: Path) -> tuple[int, str] | None:
    try:
        return path.stat().st_size, sha256_of(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def _read_shard(path: Path, skip: bool) -> tuple[ShardEntry, ShardScan] | list[str]:
    """A shard's entry, or its problems, so that those of all shards come out at once."""
    try:
        scan = scan_checked(path, skip)
        return ShardEntry(path.name, len(scan.offsets), path.stat().st_size, sha256_of(path)), scan
    except ConfigError as error:
        return error.problems
    except OSError as error:
        return [f"{path}: cannot be read: {error}"]


def _one_folder(paths: Sequence[Path]) -> list[Path]:
    folders = list(dict.fromkeys(path.parent for path in paths))
    if len(folders) != 1:
        names = ", ".join(map(str, folders)) or "none"
        raise ConfigError(f"shards: expected files of one folder, where the manifest goes, found {names}")
    return folders


def set_name(paths: Sequence[Path]) -> str:
    """A set's name from its files': ``train-000000.tar``, ``train-000001.tar`` → ``train``; ``shards`` if they share none."""
    stem = os.path.commonprefix([path.name.removesuffix(".tar") for path in paths])
    return re.sub(r"[-_.]*[0-9]*$", "", stem) or "shards"


def _map(work, items, processes):  # type: ignore[no-untyped-def]  # a generic of its own would say no more
    """``work`` of each item, in order. Raises: PeerError: a process was killed."""
    if processes <= 1:
        return [work(item) for item in items]
    try:
        with ProcessPoolExecutor(processes) as pool:
            return list(pool.map(work, items))
    except BrokenProcessPool as error:
        raise PeerError(
            f"{items[0]} …: a process that read shards was killed (out of memory?); give fewer processes"
        ) from error
