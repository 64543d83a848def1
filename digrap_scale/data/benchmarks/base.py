"""What every converter shares: where a benchmark's files are, samples on their way to shards, what is skipped and why.

A converter reads annotations (small enough for memory) and yields items in the order of their file; images are read one
at a time while the shards are written. Equal inputs give equal shards, and a set appears whole or not at all.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from digrap_scale.data.reading import decode_image
from digrap_scale.data.shards import Manifest, write_shards
from digrap_scale.errors import ConfigError

JPEG_QUALITY = 92
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class Sources:
    """A benchmark's files as they were downloaded; a converter says which it needs.

    Attributes:
        images: folder of the images.
        annotations: answers or labels.
        questions: questions, where they have a file of their own.
        subset: the question ids of a subset.
    """

    images: Path
    annotations: Path | None = None
    questions: Path | None = None
    subset: Path | None = None


@dataclass(frozen=True)
class Item:
    """A sample whose image is not read yet.

    Attributes:
        key: of the sample in its shard.
        images: where the image may be, relative to the folder of images; the first that is there counts.
        meta: the sample's JSON.
        where: file and id, for messages.
    """

    key: str
    images: tuple[str, ...]
    meta: dict[str, Any]
    where: str


@dataclass(frozen=True)
class Problem:
    """A sample that cannot be converted: ``kind`` is counted, ``message`` is one line that names file and key."""

    kind: str
    message: str


def items(records: Iterable[Any], make: Callable[..., Item]) -> Iterator[Item | Problem]:
    """``make(*record)`` of each record that is not a problem already; a record that it refuses becomes one."""
    for record in records:
        if isinstance(record, Problem):
            yield record
            continue
        try:
            item = make(*record)
        except ConfigError as error:
            yield Problem("bad record", str(error))
        else:
            yield item


@dataclass(frozen=True)
class Benchmark:
    """One benchmark's format.

    Attributes:
        needs: fields of ``Sources`` that ``read`` uses, ``images`` aside.
        read: yields items and problems in the order of the annotation files.

    ``read`` raises ConfigError where a file cannot be used at all.
    """

    needs: tuple[str, ...]
    read: Callable[[Sources], Iterator[Item | Problem]]


@dataclass
class Converted:
    """What came out: the shards, and how many samples were skipped by kind, each with its first message."""

    manifest: Manifest | None = None
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)


def convert(
    benchmark: Benchmark,
    sources: Sources,
    folder: str | Path,
    *,
    prefix: str,
    samples_per_shard: int = 2000,
    skip: bool = False,
    longest_side_pixels: int | None = None,
) -> Converted:
    """Writes ``PREFIX-000000.tar`` … and their manifest into ``folder``; see ``write_shards``.

    Args:
        skip: count samples that cannot be converted and go on; else the first one ends it.
        longest_side_pixels: shrink larger images to this (bicubic, JPEG of quality 92); else files are kept as they are.

    Raises:
        ConfigError: a file is missing or of another format, a sample cannot be converted, or none is left.
        SaveError: the disk refuses.
    """
    for name in benchmark.needs:
        if getattr(sources, name) is None:
            raise ConfigError(f"{name}: this benchmark needs a file for it; give --{name} FILE")
    if not sources.images.is_dir():
        raise ConfigError(f"images: {sources.images} is not a folder")
    converted = Converted()
    samples = _samples(benchmark, sources, converted, skip, longest_side_pixels)
    converted.manifest = write_shards(samples, folder, prefix=prefix, samples_per_shard=samples_per_shard)
    return converted


def _samples(
    benchmark: Benchmark, sources: Sources, converted: Converted, skip: bool, longest_side_pixels: int | None
) -> Iterator[dict[str, Any]]:
    last: tuple[Path | None, bytes, str] = (None, b"", "")  # neighbours often ask about the same image
    for item in benchmark.read(sources):
        found = item if isinstance(item, Problem) else _find(item, sources.images)
        if isinstance(found, Path) and found != last[0]:
            try:
                last = (found, *_load(found, longest_side_pixels))
            except ConfigError as error:
                found = Problem("unreadable image", str(error))
        if isinstance(found, Problem):
            if not skip:
                raise ConfigError(found.message)
            converted.skipped[found.kind] += 1
            converted.examples.setdefault(found.kind, found.message)
            continue
        assert isinstance(item, Item)
        yield {"key": item.key, "image": last[1], "extension": last[2], "meta": item.meta}


def _find(item: Item, folder: Path) -> Path | Problem:
    for name in item.images:
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            return Problem("bad image name", f"{item.where}: image {name!r} does not stay in the folder of images")
        if (folder / relative).is_file():
            return folder / relative
    return Problem("missing image", f"{item.where}: no image {' or '.join(item.images)} in {folder}")


def _load(path: Path, longest_side_pixels: int | None) -> tuple[bytes, str]:
    """The image's bytes, decoded once to see that they are whole, and the extension by content: names can be wrong."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    image = decode_image(data, str(path))
    if longest_side_pixels is None or max(image.size) <= longest_side_pixels:
        with Image.open(io.BytesIO(data)) as header:
            return data, _EXTENSIONS[str(header.format)]
    image.thumbnail((longest_side_pixels, longest_side_pixels), Image.Resampling.BICUBIC)
    memory = io.BytesIO()
    image.save(memory, "JPEG", quality=JPEG_QUALITY)
    return memory.getvalue(), "jpg"
