"""Tar files as shards: what a sample's members are, where in the file each sample lies, and reading one by number.

``scan_shard`` walks through all headers once and finds what ``tarfile`` passes over in silence: a file that ends within
a header or without its end mark, a damaged header, data behind the end mark. What it returns, [start, bytes, text
bytes] of every sample, is what a manifest keeps, so that ``ShardReader`` gets any sample with a single read, wherever
it lies. (webdataset streams a shard from its start, and its ``wids`` walks through a shard's headers when it opens it.)
"""

# n samples of a shard

from __future__ import annotations

import io
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from digrap_scale.errors import ConfigError

IMAGE_EXTENSIONS = ("webp", "jpg", "jpeg", "png")
TEXT_EXTENSIONS = ("json", "txt", "cls")
EXTENSIONS = (*IMAGE_EXTENSIONS, *TEXT_EXTENSIONS)
MAX_SAMPLE_BYTES = 256 * 2**20
MAX_OPEN_SHARDS = 64
HEADER_BYTES = tarfile.BLOCKSIZE
OFFSET_COLUMNS = ("start", "bytes", "text_bytes")
# One image, or several that are numbered: KEY.webp; KEY.0.webp, KEY.1.webp.
IMAGE_MEMBER = re.compile(rf"(?:(0|[1-9][0-9]{{0,3}})\.)?(?:{'|'.join(IMAGE_EXTENSIONS)})")


class SampleError(ConfigError):
    """One sample cannot be used; ``data.on_bad_sample: skip`` leaves it out."""


def split_name(path: Path | str, name: str) -> tuple[str, str]:
    """``a/b.webp`` → (``a/b``, ``webp``): the extension starts at the first dot of the last part.

    Raises:
        SampleError: the extension is not in the allow-list.
    """
    folder, _, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    if not stem or not (extension.lower() in TEXT_EXTENSIONS or IMAGE_MEMBER.fullmatch(extension.lower())):
        raise SampleError(
            f"{path}: member {name!r}: expected KEY.EXTENSION with one of {', '.join(EXTENSIONS)}, or KEY.0.EXTENSION, "
            "KEY.1.EXTENSION … for several images"
        )
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


@dataclass
class ShardScan:
    """What a walk through a shard's headers finds.

    Attributes:
        offsets: [n, 3] uint64: each sample's first byte, its bytes with headers, and bytes of its json, txt and cls.
        problems: what is wrong with the file, a line each; samples that are not known to be whole are not among ``offsets``.
    """

    offsets: np.ndarray
    problems: list[str]


@dataclass
class _Walk:
    """The samples found so far, and the one whose members are being read."""

    path: Path
    rows: list[tuple[int, int, int] | None] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seen: dict[str, tuple[int, tuple[str, ...]]] = field(default_factory=dict)  # key → its row, its members' extensions
    kinds: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)  # equal extensions are kept once
    key: str | None = None
    extensions: list[str] = field(default_factory=list)
    foreign: bool = False  # a member of no sample stands between this sample's
    foreign_behind: bool = False  # one stands behind its last member so far
    start: int = 0
    stop: int = 0
    text_bytes: int = 0
    end: int = 0  # of the member before, whatever it is

    def member(self, member: tarfile.TarInfo) -> None:
        self.end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        try:
            key, extension = split_name(self.path, member.name)
            if not member.isreg() or member.issparse():
                raise SampleError(f"{self.path}: member {member.name!r} is not a regular file")
        except SampleError as error:
            self.problems += error.problems
            self.foreign_behind = True
            return
        if key != self.key:
            self.finish()
            self.key, self.start, self.text_bytes = key, member.offset, 0
            self.extensions, self.foreign = [], False
        else:
            self.foreign |= self.foreign_behind
        self.foreign_behind = False
        self.stop = self.end
        self.extensions.append(extension)
        self.text_bytes += member.size if extension in TEXT_EXTENSIONS else 0

    def finish(self) -> None:
        """The open sample is whole: another one, or the file's end, comes after it."""
        if self.key is None:
            return
        extensions = tuple(self.extensions)
        if self.key in self.seen:
            row, known = self.seen[self.key]
            left_out = ""
            if not set(extensions) <= set(known):  # not the same once more: its members stand apart
                self.rows[row] = None
                left_out = "; it is no whole sample"
            self.problems.append(
                f"{self.path}: sample {self.key} comes again at byte {self.start}: keys must be unique in a shard and "
                f"a sample's members stand next to each other{left_out}"
            )
        elif not self.foreign:  # what stands between its members would be read with them
            self.seen[self.key] = len(self.rows), self.kinds.setdefault(extensions, extensions)
            self.rows.append((self.start, self.stop - self.start, self.text_bytes))
        self.key = None

    def broke_off(self, problem: str) -> None:
        """The file cannot be read on; what else the open sample had is not known."""
        where = (
            "before its first sample" if self.key is None else f"within or after sample {self.key}, which is left out"
        )
        self.problems.append(f"{self.path}: {problem} {where}")
        self.key = None


def scan_shard(path: Path) -> ShardScan:
    """Walks through all of a shard's headers; reads no data of members.

    Raises:
        ConfigError: the file cannot be opened as a plain tar file.
    """
    walk = _Walk(path)
    try:
        with open(path, "rb") as stream:
            tar = tarfile.open(fileobj=stream, mode="r:")
            try:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would remember every member
                    if member.isdir():
                        walk.end = member.offset_data
                    else:
                        walk.member(member)
                _find_end(stream, walk)
            except tarfile.TarError as error:
                walk.broke_off(f"is cut off or broken ({error})")
    except (OSError, tarfile.TarError) as error:
        raise ConfigError(f"{path}: cannot be read as a plain tar file: {error}") from error
    walk.finish()
    rows = [row for row in walk.rows if row is not None]
    return ShardScan(np.array(rows, dtype=np.uint64).reshape(-1, len(OFFSET_COLUMNS)), walk.problems)


def _find_end(stream: IO[bytes], walk: _Walk) -> None:
    """Whether the file's end is one; ``tarfile`` takes a broken header, and half of one, for the end."""
    size, end = os.fstat(stream.fileno()).st_size, walk.end
    stream.seek(end)
    header = stream.read(tarfile.BLOCKSIZE)
    if not header:
        walk.broke_off("ends without an end mark: it is cut off")
    elif len(header) < tarfile.BLOCKSIZE:
        walk.broke_off(f"is cut off within a header at byte {end}")
    elif header.count(0) != tarfile.BLOCKSIZE:
        walk.broke_off(f"has a damaged header at byte {end}, so that {size - end} bytes are not read,")
    else:
        while block := stream.read(1 << 20):
            if block.count(0) != len(block):
                behind = f"after sample {walk.key}" if walk.key is not None else "before its first sample"
                walk.problems.append(
                    f"{walk.path}: has data behind its end mark at byte {end}, which nothing would read, {behind}"
                )
                return


def scan_checked(path: Path, skip: bool = False) -> ShardScan:
    """``scan_shard``, refusing a shard with problems unless ``skip``.

    Raises:
        ConfigError: every problem of the shard.
    """
    scan = scan_shard(path)
    if scan.problems and not skip:
        raise ConfigError(scan.problems)
    return scan


def parse_sample(path: Path, data: bytes) -> dict[str, Any]:
    """The members of one sample, grouped as webdataset does it: ``__key__``, ``__url__``, extension → bytes.

    Raises:
        SampleError: the same member twice.
        ConfigError: the bytes are not the members of one sample: the file is not the one that was indexed.
    """
    sample: dict[str, Any] = {"__url__": str(path)}
    try:
        for name, content in _members(data):
            key, extension = split_name(path, name)
            if sample.setdefault("__key__", key) != key:
                raise tarfile.TarError(f"members of samples {sample['__key__']} and {key}")
            if extension in sample:
                raise SampleError(f"{path}: sample {key} has the same member twice: {extension}")
            sample[extension] = content
        if "__key__" not in sample:
            raise tarfile.TarError("no member")
    except tarfile.TarError as error:
        raise ConfigError(
            f"{path}: no sample where one should be ({error}): the file changed after it was indexed; "
            "write its manifest anew (digrap-scale index)"
        ) from error
    return sample


def _members(data: bytes) -> list[tuple[str, bytes]]:
    """Names and contents. Plain headers are read here, several times faster; anything else is left to ``tarfile``."""
    found = []
    at = 0
    while at < len(data):
        header = data[at : at + tarfile.BLOCKSIZE]
        size = _plain_size(header)
        if size is None:
            return _members_by_tarfile(data)
        at += tarfile.BLOCKSIZE
        name = _name_of(header)
        found.append((name, data[at : at + size]))
        if len(found[-1][1]) != size:
            raise tarfile.TarError(f"member {name!r} is cut off")
        at += -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return found


def plain_name(header: bytes) -> str | None:
    """The name in a header of ``HEADER_BYTES``; None where it is not plain, see ``_plain_size``."""
    return None if _plain_size(header) is None else _name_of(header)


def _name_of(header: bytes) -> str:
    return header[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _plain_size(header: bytes) -> int | None:
    """The size of a regular file with a sound header whose name stands in it whole; None of anything else.

    Layout: POSIX.1-1988 ustar. Name at 0 (100 bytes), size at 124 (12, octal), checksum at 148 (8), type at 156, prefix of
    the name at 345 (155). The checksum is the sum of all bytes, its own taken as spaces.
    """
    if len(header) != tarfile.BLOCKSIZE or header[156:157] not in (b"0", b"\0") or header[345] or header[124] >= 128:
        return None
    try:
        size, checksum = int(header[124:136].strip(b" \0"), 8), int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return None
    return size if checksum == sum(header) - sum(header[148:156]) + 8 * 0x20 else None


def _members_by_tarfile(data: bytes) -> list[tuple[str, bytes]]:
    """The same for long names, pax headers, folders.

    Raises:
        tarfile.TarError: a header is damaged, which ``tarfile`` alone takes for the end.
    """
    found = []
    end = 0
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if (stream := tar.extractfile(member)) is not None:
                found.append((member.name, stream.read()))
    if end != len(data):
        raise tarfile.TarError(f"a damaged header at byte {end} of it, or its end is cut off")
    return found


# The offsets of a shard, when somebody asks for them; see ``ShardScan.offsets``.
Offsets = Callable[[], np.ndarray]


class ShardReader:
    """Any sample of a set of shards by its number, with one read.

    Keeps up to ``MAX_OPEN_SHARDS`` files open. Belongs to one process.

    Args:
        paths: the shards.
        offsets: of each shard, or None: its headers are then walked through when its first sample is asked for.
        skip: leave out samples that such a walk finds broken, as when they were counted.
    """

    def __init__(self, paths: Sequence[Path], offsets: Sequence[Offsets | None] | None = None, skip: bool = False):
        self._paths = paths
        self._offsets = offsets if offsets is not None else [None] * len(paths)
        self._skip = skip
        self._open: OrderedDict[int, tuple[IO[bytes], np.ndarray]] = OrderedDict()

    def read(self, shard: int, index: int) -> dict[str, Any]:
        """Sample ``index`` of shard ``shard``, encoded; see ``parse_sample``.

        Raises:
            SampleError, ConfigError: the sample, or the shard, is not what it should be.
        """
        path = self._paths[shard]
        stream, offsets = self._opened(shard)
        if index >= len(offsets):
            raise ConfigError(
                f"{path}: has {len(offsets)} samples, expected {index + 1} or more: the file changed after it was "
                "counted; write its manifest anew (digrap-scale index)"
            )
        start, size = int(offsets[index, 0]), int(offsets[index, 1])
        if size > MAX_SAMPLE_BYTES:
            raise SampleError(f"{path}: sample {index} has {size} bytes, limit {MAX_SAMPLE_BYTES}")
        try:
            data = os.pread(stream.fileno(), size, start)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read at byte {start}: {error}") from error
        if len(data) != size:
            raise ConfigError(
                f"{path}: expected {size} bytes at byte {start}, found {len(data)}: the file was cut off after it was "
                "counted; restore it"
            )
        return parse_sample(path, data)

    def _opened(self, shard: int) -> tuple[IO[bytes], np.ndarray]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        path, offsets = self._paths[shard], self._offsets[shard]
        known = offsets() if offsets is not None else scan_checked(path, self._skip).offsets
        try:
            stream = open(path, "rb", buffering=0)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read as a plain tar file: {error}") from error
        self._open[shard] = stream, known
        if len(self._open) > MAX_OPEN_SHARDS:
            self._open.popitem(last=False)[1][0].close()
        return self._open[shard]

    def close(self) -> None:
        """Closes all files."""
        while self._open:
            self._open.popitem()[1][0].close()
