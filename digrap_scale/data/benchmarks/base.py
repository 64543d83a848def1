"""What every converter shares: where a benchmark's files are, samples on their way to shards, what is skipped and why.

A converter reads annotations (small enough for memory) and yields items in the order of their file; images are read one
at a time while the shards are written (``make.py``). Equal inputs give equal shards, and a set appears whole or not at all.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from PIL import Image

from digrap_scale.data import make as making
from digrap_scale.data.listing import stays_inside
from digrap_scale.data.manifest import Manifest
from digrap_scale.data.reading import decode_image
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

    def skip(self, problem: Problem) -> None:
        """Counts it."""
        self.skipped[problem.kind] += 1
        self.examples.setdefault(problem.kind, problem.message)


def convert(
    benchmark: Benchmark,
    sources: Sources,
    folder: str | Path,
    *,
    prefix: str,
    samples_per_shard: int = 2000,
    shard_bytes: int | None = None,
    processes: int = 1,
    skip: bool = False,
    longest_side_pixels: int | None = None,
) -> Converted:
    """Writes ``PREFIX-000000.tar`` … and their manifest into ``folder``; see ``make_shards``.

    Args:
        shard_bytes: of a shard's file, at most; not with ``longest_side_pixels``, where images have no size yet.
        processes: shards written at a time.
        skip: count samples that cannot be converted and go on; else the first one ends it.
        longest_side_pixels: shrink larger images to this (bicubic, JPEG of quality 92); else files are kept as they are.

    Raises:
        ConfigError: a file is missing or of another format, a sample cannot be converted, or none is left.
        PeerError: a process was killed.
        SaveError: the disk refuses.
    """
    for name in benchmark.needs:
        if getattr(sources, name) is None:
            raise ConfigError(f"{name}: this benchmark needs a file for it; give --{name} FILE")
    if not sources.images.is_dir():
        raise ConfigError(f"images: {sources.images} is not a folder")
    converted = Converted()
    samples: list[making.Item] = []
    for item in benchmark.read(sources):
        sample = item if isinstance(item, Problem) else _sample(item, sources.images, longest_side_pixels)
        if isinstance(sample, making.Item):
            samples.append(sample)
        elif skip:
            converted.skip(sample)
        else:
            raise ConfigError(sample.message)
    made = making.make_shards(
        samples,
        Path(folder),
        prefix=prefix,
        samples_per_shard=samples_per_shard,
        shard_bytes=shard_bytes,
        processes=processes,
        skip=skip,
    )
    for line in made.left_out:
        converted.skip(Problem("unreadable image", line))
    converted.manifest = made.manifest
    return converted


def _sample(item: Item, folder: Path, longest_side_pixels: int | None) -> making.Item | Problem:
    """The item with the first of its images that is there."""
    for name in item.images:
        if not stays_inside(folder, name):
            return Problem("bad image name", f"{item.where}: image {name!r} does not stay in the folder of images")
        path = folder / name
        if path.is_file():
            state = path.stat()
            images = partial(_load, path, state.st_mtime_ns, longest_side_pixels)
            sizes = (state.st_size,) if longest_side_pixels is None else None
            return making.Item(item.key, item.meta, images, sizes, (state.st_mtime_ns, longest_side_pixels or 0))
    return Problem("missing image", f"{item.where}: no image {' or '.join(item.images)} in {folder}")


@lru_cache(maxsize=1)  # neighbours often ask about the same image
def _load(path: Path, _written_ns: int, longest_side_pixels: int | None) -> list[tuple[str, bytes]]:
    """The image, decoded once to see that it is whole; the extension is that of its content: names can be wrong."""
    data = path.read_bytes()
    image = decode_image(data, str(path))
    if longest_side_pixels is None or max(image.size) <= longest_side_pixels:
        with Image.open(io.BytesIO(data)) as header:
            return [(_EXTENSIONS[str(header.format)], data)]
    image.thumbnail((longest_side_pixels, longest_side_pixels), Image.Resampling.BICUBIC)
    memory = io.BytesIO()
    image.save(memory, "JPEG", quality=JPEG_QUALITY)
    return [("jpg", memory.getvalue())]
